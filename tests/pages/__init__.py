"""The pages that people read: README.md, CONTRIBUTING.md, CHANGELOG.md and docs/."""
