"""What is downloaded is there whole and as it was published, or not at all, and a sentence says why."""

from __future__ import annotations

import hashlib
import re
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.base import DataError
from data.sources import downloads
from data.sources.downloads import fetch_archive, fetch_file, retrieve, retrieve_archive

CONTENT = bytes(range(256)) * 400
GOOD = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A web server: /whole, /cut (at 5 %), /short (says less than there is), /wrong, /mute (no length), /NAME.zip."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            body = (tmp_path / name).read_bytes() if name.endswith(".zip") else CONTENT
            if name == "gone":
                return self.send_error(404)
            if name == "wrong":
                body = body[:-1] + b"?"
            self.send_response(200)
            if name != "mute":
                self.send_header("Content-Length", str(len(body) - (100 if name == "short" else 0)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 20] if name == "cut" else body)
            return None

        def log_message(self, *args: object) -> None:
            """Stay quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}/"
        http.shutdown()


def left(folder: Path) -> list[str]:
    """Names in a folder, but for its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.mark.parametrize(
    "name, digest, why",
    [
        ("cut", GOOD, "broke off after 5120 of 102400 bytes"),
        ("short", GOOD, "what came has the checksum sha256:"),
        ("wrong", GOOD, "what came has the checksum sha256:"),
        ("gone", GOOD, "404"),
        ("whole", None, "is not https and there is no checksum"),
    ],
)
def test_what_is_not_whole_is_not_kept(tmp_path: Path, site: str, name: str, digest: str | None, why: str) -> None:
    (folder := tmp_path / "set").mkdir()
    with pytest.raises(DataError) as error:
        fetch_file(folder / "faces.mat", site + name, True, "dataset.source=olivetti", digest)
    sentence = str(error.value)
    assert why in sentence and f"put it there from {site}{name}" in sentence and "\n" not in sentence
    assert left(folder) == []
    (folder / "faces.mat").write_bytes(b"before")
    with pytest.raises(OSError, match=re.escape(why)):
        retrieve(folder / "faces.mat", [site + name], digest)
    assert (folder / "faces.mat").read_bytes() == b"before", "the old file or the new one"


def test_what_is_whole_comes_from_the_first_address_that_has_it(tmp_path: Path, site: str) -> None:
    retrieve(tmp_path / "faces.mat", [f"{site}gone", f"{site}cut", f"{site}mute"], GOOD)
    assert (tmp_path / "faces.mat").read_bytes() == CONTENT and left(tmp_path) == ["faces.mat"]
    before = (tmp_path / "faces.mat").stat().st_mtime_ns
    fetch_file(tmp_path / "faces.mat", f"{site}whole", True, "nothing", GOOD)
    assert (tmp_path / "faces.mat").stat().st_mtime_ns == before, "what is there is not fetched again"


def test_published_files_without_a_checksum_come_by_https() -> None:
    from data import autoencoding, text, vision

    assert all(url.startswith("https://") for url in (autoencoding.PUBLISHED, *text.MIRRORS))
    assert len(vision.TINY_IMAGENET[1]) == 32, "its site has no https, and its archive a checksum"


def zipped(path: Path, members: dict[str, str]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"


def test_an_archive_is_unpacked_whole_or_not_at_all(
    tmp_path: Path, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {f"set/{name}.txt": name for name in "abc"}
    digest = zipped(tmp_path / "set.zip", members)
    (folder := tmp_path / "here").mkdir()

    def killed(self: zipfile.ZipFile, *args: object, **options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "_extract_member", killed)
    with pytest.raises(KeyboardInterrupt):
        retrieve_archive(folder, [f"{site}set.zip"], digest)
    assert left(folder) == ["set.zip"], "no half of a set that would be taken for one"
    monkeypatch.undo()
    retrieve_archive(folder, ["http://nowhere/set.zip"], digest)  # it is here, and whole
    assert left(folder) == ["set"] and left(folder / "set") == ["a.txt", "b.txt", "c.txt"]


@pytest.mark.parametrize("member", ["../outside.txt", "/outside.txt", "set/../../outside.txt", "..\\outside.txt"])
def test_an_archive_that_reaches_outside_is_refused(tmp_path: Path, site: str, member: str) -> None:
    digest = zipped(tmp_path / "set.zip", {"set/a.txt": "a", member: "b"})
    (folder := tmp_path / "deep" / "here").mkdir(parents=True)
    with pytest.raises(DataError, match=r"has a member .* outside of its folder"):
        fetch_archive("a set", folder, lambda: None, f"{site}set.zip", digest.removeprefix("md5:"), True)
    assert not list(tmp_path.rglob("outside.txt")) and left(folder) == ["set.zip"]


def test_a_redirection_out_of_https_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        url = "http://elsewhere/faces.mat"

        def __enter__(self) -> Answer:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

    # There is no server of https here: what urllib would hand over, had it followed the redirection.
    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda url, timeout: Answer())
    with pytest.raises(OSError, match=r"leads to http://elsewhere/faces.mat, which is not https"):
        retrieve(tmp_path / "faces.mat", ["https://here/faces.mat"])
    assert left(tmp_path) == []
