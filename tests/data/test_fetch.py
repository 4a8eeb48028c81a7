"""What is brought before a run needs it: from a server on this machine, with progress, sums and sentences."""

from __future__ import annotations

import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from data import fetch
from data.base import DataError

CONTENT = bytes(range(256)) * 400


class Slow(BaseHTTPRequestHandler):
    """Half of a file, a pause, and the rest."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(CONTENT[:50_000])
        self.wfile.flush()
        time.sleep(0.4)
        self.wfile.write(CONTENT[50_000:])

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def numbers(root: str, site: str, download: bool = False, *, seed: int) -> None:
    """A data set that is downloaded."""
    path = Path(root) / "sub" / "numbers.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() and not download:
        raise DataError("absent")
    try:
        with urllib.request.urlopen(site + path.name, timeout=5) as answer, path.open("wb") as file:
            while block := answer.read(10_000):
                file.write(block)
                file.flush()
    except OSError as error:
        raise DataError(f"cannot be downloaded ({error})") from error


def test_a_set_from_a_server(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for group in ("dataset", "model"):
        (tmp_path / "configs" / group).mkdir(parents=True)
    text = f"_target_: tests.data.test_fetch.numbers\nroot: ${{paths.data}}/n\ndownload: false\nsite: {site}\n"
    (tmp_path / "configs" / "dataset" / "numbers.yaml").write_text(text)
    monkeypatch.setattr(fetch, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(fetch, "PACE", 0.1)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(fetch.SIZES, "numbers", len(CONTENT))
    assert fetch.main(["--list"]) == 0
    assert "numbers" in (listed := capsys.readouterr().out) and "download 0.1 MB" in listed and "absent" in listed
    assert fetch.main(["numbers"]) == 0
    told = capsys.readouterr()
    assert told.out == f"numbers: 0.1 MB in {tmp_path / 'data' / 'n'}\n"
    assert "numbers: 0.1 MB of 0.1 MB" in told.err, "progress"
    check = ["sha256sum", "-c", "SHA256SUMS"]
    done = subprocess.run(check, cwd=tmp_path / "data" / "n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "sub/numbers.bin: OK\n"
    text = text.replace(site, "http://127.0.0.1:9/")
    (tmp_path / "configs" / "dataset" / "numbers.yaml").write_text(text)
    assert fetch.main(["numbers"]) == 1
    assert "error: numbers: cannot be downloaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifra10", "did you mean 'cifar10'?"),
        ("image_folder", "data of yours"),
        ("imagenet", "data of yours"),
        ("mlp", "no weights of this model are published"),
    ],
)
def test_names_that_bring_nothing(name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main([name]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {name}: ") and says in told and len(told.splitlines()) == 1


def test_what_comes_with_a_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main(["digits"]) == 0
    assert "nothing to bring" in capsys.readouterr().out


def test_every_set_is_listed_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main([]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(fetch.choices("dataset")) <= set(lines) and "weights:" in lines
    assert "170.5 MB" in lines["cifar10_autoencoder"] and "yours" in lines["text_file"]
    assert "with a package" in lines["digits"] and "resnet18" in lines["weights:"]
