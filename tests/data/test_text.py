"""Texts: what is a token, how windows are cut and served, where files are found, and the sentences for users."""

from __future__ import annotations

import hashlib
import inspect
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import data
from data import text
from data.text import IGNORED, Vocabulary, _wikitext, tokenise, windows

ROOT = Path(__file__).resolve().parents[2]
INJECTED = {"seed", "device", "rank", "world_size"}
SMALL = {"sequence": 3, "batch_size": 2, "eval_batch_size": 4}


def write_wikitext(folder: Path, lines: int = 20) -> Path:
    """A set in the published form: line i of the training text is ``w0 w1 ... wi <unk>``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in {"train": lines, "valid": 5, "test": 7}.items():
        content = [" " + " ".join(f"w{i}" for i in range(line)) + " <unk> \n" for line in range(count)]
        (folder / f"wiki.{name}.tokens").write_text("".join(content) + (" novel word \n" if name != "train" else ""))
    return folder


def served(loader: data.BatchLoader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    """Windows as they are served: inputs and the last target."""
    return [
        [*line.tolist(), int(target[-1])]
        for inputs, targets in loader.epoch(epoch, start)
        for line, target in zip(inputs, targets, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------- tokens


def test_words_lines_and_characters() -> None:
    assert tokenise(" a b \n\nc", "word") == ["a", "b", "<eos>", "<eos>", "c"]
    assert tokenise("a b\n", "character") == ["a", " ", "b", "\n"]
    words = Vocabulary.of(["b", "a", "b", "<eos>", "b", "<eos>"], "word")
    assert words.words == ["b", "<eos>", "a", "<unk>"], "the most frequent first, then by the alphabet"
    assert words.encode(["a", "b", "z"]).tolist() == [2, 0, 3]
    assert words.decode([2, 0, 1, 1, 3]) == "a b\n\n<unk>"
    characters = Vocabulary.of("hello", "character")
    assert characters.decode(characters.encode(list("hole")).tolist()) == "hole"


@pytest.mark.parametrize("size, kept", [(2, ["b", "<unk>"]), (3, ["b", "a", "<unk>"]), (4, ["b", "a", "c", "<unk>"])])
def test_a_smaller_vocabulary_keeps_the_frequent_tokens_and_the_unknown_one(size: int, kept: list[str]) -> None:
    assert Vocabulary.of("bbbaac", "character", size).words == kept
    frequent = Vocabulary.of(["<unk>", "<unk>", "b", "b", "b", "a"], "word", 2)
    assert frequent.words == ["b", "<unk>"]


def test_the_vocabulary_is_that_of_the_training_text(tmp_path: Path) -> None:
    found = data.wikitext2(str(write_wikitext(tmp_path)), **SMALL)
    words = found.facts["words"]
    assert sorted(words) == sorted([*(f"w{i}" for i in range(19)), "<unk>", "<eos>"])
    assert found.facts == {"vocabulary": 21, "sequence": 3, "words": words, "level": "word"}
    assert (found.task, found.class_names) == ("language_modelling", words)
    targets = torch.cat([targets.flatten() for _, targets in found.val.epoch(0)])
    last = [words[target] for target in targets[targets != IGNORED].tolist()[-3:]]
    assert last == ["<unk>", "<unk>", "<eos>"], "'novel word' is in no training text"
    assert data.wikitext2(str(tmp_path), **SMALL, max_vocabulary=5).facts["vocabulary"] == 5


# --------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("length, sequence", [(2, 3), (4, 3), (5, 3), (7, 3), (20, 1), (5, 50)])
def test_every_token_but_the_first_is_a_target_once(length: int, sequence: int) -> None:
    tokens = torch.arange(length, dtype=torch.int32)
    found = windows(tokens, sequence)
    seen = []
    for window in found.tolist():
        assert len(window) == sequence + 1
        for before, after in pairwise(window):
            if after != IGNORED:
                assert after == before + 1, "a target follows its input"
                seen.append(after)
    assert seen == list(range(1, length))


def test_a_batch_is_inputs_and_the_same_moved_on_by_one(tmp_path: Path) -> None:
    found = data.wikitext2(str(write_wikitext(tmp_path)), **SMALL)
    expected = found.train.store.windows(found.train.rows * 16)  # four tokens of four bytes
    assert expected.shape[1:] == (1, 4, 4)
    for loader in (found.train, found.val, found.test):
        for inputs, targets in loader.epoch(0):
            assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape
            assert inputs.shape[1] == 3 and inputs.min() >= 0
            assert torch.equal(inputs[:, 1:][targets[:, :-1] >= 0], targets[:, :-1][targets[:, :-1] >= 0])
    last = list(found.val.epoch(0))[-1][1][-1]
    assert (last == IGNORED).sum() == -(23 - 1) % 3, "23 tokens in windows of three"
    assert all((targets != IGNORED).all() for _, targets in found.train.epoch(0)), "training has no padding"


def test_the_real_text_is_served_whole_and_in_order(shared_data: Callable[[str], Path]) -> None:
    root = shared_data("wikitext-2")
    files = {"train": "valid.txt", "val": "test.txt"}
    found = data.wikitext2(str(root), download=False, files=files)
    assert found.facts["vocabulary"] == 13_777
    for loader, file, published in ((found.val, "test.txt", 245_569), (found.test, "test.txt", 245_569)):
        words = [word for line in (root / file).read_text().splitlines() for word in (*line.split(), "<eos>")]
        assert len(words) == published
        targets = torch.cat([targets.flatten() for _, targets in loader.epoch(0)])
        known = set(found.class_names)
        assert [found.class_names[target] for target in targets[targets != IGNORED].tolist()] == [
            word if word in known else "<unk>" for word in words[1:]
        ]
    assert found.train.num_examples == (217_646 - 1) // 256 // 16 * 16


# ----------------------------------------------------------------------------------------------- order and resuming


def test_windows_are_shuffled_every_epoch_and_go_on_in_the_middle_of_one(tmp_path: Path) -> None:
    found = data.wikitext2(str(write_wikitext(tmp_path)), **SMALL)
    epochs = [served(found.train, epoch) for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert len(epochs[0]) == found.train.num_examples
    again = data.wikitext2(str(tmp_path), **SMALL)
    assert served(again.train, 1, start=5) == epochs[1][10:]
    assert served(data.wikitext2(str(tmp_path), **SMALL, seed=1).train) != epochs[0]
    assert served(found.val, 0) == served(found.val, 1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_ranks_share_what_one_process_sees(tmp_path: Path, split: str) -> None:
    write_wikitext(tmp_path)
    alone = served(getattr(data.wikitext2(str(tmp_path), **SMALL), split))
    shares = [getattr(data.wikitext2(str(tmp_path), **SMALL, rank=rank, world_size=2), split) for rank in (0, 1)]
    together = [served(share) for share in shares]
    assert sorted([*together[0], *together[1]]) == sorted(alone)
    assert abs(len(together[0]) - len(together[1])) <= len(shares[0])


def test_limits_take_the_beginning_of_the_text(tmp_path: Path) -> None:
    whole = data.wikitext2(str(write_wikitext(tmp_path)), **SMALL)
    part = data.wikitext2(str(tmp_path), **SMALL, limit_train=0.5, limit_val=0.5)
    assert part.train.rows.tolist() == whole.train.rows.tolist()[: round(0.5 * len(whole.train.rows))]
    assert part.val.num_examples == round(0.5 * whole.val.num_examples)
    assert part.facts == whole.facts, "the vocabulary is that of the whole"


# ----------------------------------------------------------------------------------------------------------- files


def test_a_file_of_ones_own_in_three_parts(tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    path.write_text("".join(chr(200 + i) for i in range(100)), encoding="utf-8")
    found = data.text_file(str(path), level="character", sequence=5, batch_size=1, val_fraction=0.2)
    parts = [
        torch.cat([targets.flatten() for _, targets in split.epoch(0)]).tolist() for split in (found.val, found.test)
    ]
    assert [sum(target != IGNORED for target in part) for part in parts] == [19, 9]
    assert {found.class_names[t] for part in parts for t in part if t != IGNORED} == {"<unk>"}
    letters = {found.class_names[t] for _, targets in found.train.epoch(0) for t in targets.flatten().tolist()}
    assert letters <= {chr(200 + i) for i in range(1, 70)} and len(letters) == 65


def test_names_of_the_files(tmp_path: Path) -> None:
    published = served(data.wikitext2(str(write_wikitext(tmp_path / "a")), **SMALL).train)
    for name in ("train", "valid", "test"):
        (tmp_path / "a" / f"wiki.{name}.tokens").rename(tmp_path / "a" / f"{name}.txt")
    assert served(data.wikitext2(str(tmp_path / "a"), **SMALL).train) == published
    write_wikitext(tmp_path / "b" / "wikitext-2")  # as the archive has it
    assert served(data.wikitext2(str(tmp_path / "b"), **SMALL).train) == published
    swapped = data.wikitext2(str(tmp_path / "a"), files={"val": "test.txt", "test": "valid.txt"}, **SMALL)
    assert served(swapped.train) == published
    assert (swapped.val.num_examples, swapped.test.num_examples) == (13, 8)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A published archive on a web server of our own: its address and its checksum."""
    folder = write_wikitext(tmp_path / "served" / "wikitext-2")
    path = tmp_path / "served" / "wikitext-2-v1.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"wikitext-2/{file.name}")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Stay quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served"))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}/", hashlib.md5(path.read_bytes()).hexdigest()
        http.shutdown()


@pytest.fixture
def closed() -> Iterator[str]:
    """An address that refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"


def test_a_missing_set_comes_from_the_first_mirror_that_answers(
    tmp_path: Path, server: tuple[str, str], closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, md5 = server
    monkeypatch.setattr(text, "MIRRORS", (closed, f"{address}nowhere/", address))
    build = _wikitext("small", "wikitext-2", md5, "A set.")
    found = build(str(tmp_path / "new"), **SMALL)
    assert served(found.train) == served(data.wikitext2(str(tmp_path / "served" / "wikitext-2"), **SMALL).train)
    assert not list((tmp_path / "new").rglob("*.zip"))
    monkeypatch.setattr(text, "MIRRORS", (closed,))
    assert served(build(str(tmp_path / "new"), **SMALL).train) == served(found.train)


def test_an_archive_with_another_checksum_is_refused(
    tmp_path: Path, server: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MIRRORS", (server[0],))
    with pytest.raises(data.DataError, match=r"train text of wikitext2, is absent .* \(what came has the checksum"):
        data.wikitext2(str(tmp_path / "new"), **SMALL)


@pytest.mark.parametrize("download", [True, False])
def test_offline_ends_in_one_sentence(
    tmp_path: Path, closed: str, download: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MIRRORS", (closed, closed))
    for build in (data.wikitext2, data.wikitext103):
        with pytest.raises(data.DataError) as error:
            build(str(tmp_path / "new"), download=download)
        sentence = str(error.value)
        assert sentence.startswith("wiki.train.tokens, the train text of wikitext") and "\n" not in sentence
        assert "dataset.root" in sentence and "dataset=text_file" in sentence and len(sentence) < 600
        assert ("cannot be downloaded" in sentence) == download != ("set dataset.download=true" in sentence)


def test_what_is_no_text_ends_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\xff\xfe\x00" * 10)
    (tmp_path / "word").write_text("word")
    for name, sentence in {
        "picture": "cannot be read as text .*: name a UTF-8 file with dataset.path",
        "absent": "cannot be read as text .*No such file",
        "word": "the train text of text_file has [01] tokens and at least 2 are needed",
    }.items():
        with pytest.raises(data.DataError, match=sentence):
            data.text_file(str(tmp_path / name))


# ------------------------------------------------------------------------------------------- as other systems write it

POEM = "the cat sat\non the mat\n\nthe café\n" * 8


@pytest.mark.parametrize("level", ["word", "character"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_marks_and_line_ends_of_any_system_change_no_token(
    tmp_path: Path, level: Any, mark: bytes, end: bytes
) -> None:
    (tmp_path / "plain").write_bytes(POEM.encode())
    (tmp_path / "other").write_bytes(mark + POEM.encode().replace(b"\n", end))
    plain, other = (data.text_file(str(tmp_path / name), level, **SMALL) for name in ("plain", "other"))
    assert other.facts == plain.facts
    assert served(other.train) == served(plain.train) and served(other.test) == served(plain.test)


def test_marks_of_texts_that_were_put_together_are_no_characters(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfone two\n" * 20)
    assert data.text_file(str(tmp_path / "text"), **SMALL).facts["vocabulary"] == 4  # one two <eos> <unk>


def test_a_published_set_with_marks_has_the_same_vocabulary(tmp_path: Path) -> None:
    plain, marked = write_wikitext(tmp_path / "plain"), write_wikitext(tmp_path / "marked")
    for file in marked.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    one, two = (data.wikitext2(str(folder), download=False, **SMALL) for folder in (plain, marked))
    assert one.facts == two.facts and served(one.test) == served(two.test)


@pytest.mark.parametrize(
    "content, reason",
    [
        (POEM.encode("latin-1"), r"byte 31, in line 4, is 0xe9 and no UTF-8"),
        (b"x" * 100_000 + b"\n" + POEM.encode("cp1252"), r"byte 100032, in line 5, is 0xe9 and no UTF-8"),
        (b"cut in two \xe2\x82", r"byte 11, in line 1, is 0xe2 and no UTF-8"),
        (POEM.encode("utf-16"), r"it is in UTF-16, byte 0 is 0xff"),
        (b"\xfe\xff" + POEM.encode("utf-16-be"), r"it is in UTF-16, byte 0 is 0xfe"),
        (POEM.encode("utf-32"), r"it is in UTF-32, byte 0 is 0xff"),
        ("the cat".encode("utf-16-le"), r"byte 1, in line 1, is 0x00: it is in UTF-16, or no text"),
        (b"\x7fELF\x02\0\0", r"byte 5, in line 1, is 0x00: it is in UTF-16, or no text"),
    ],
)
@pytest.mark.parametrize("level", ["word", "character"])
def test_another_encoding_is_named_with_its_byte(tmp_path: Path, content: bytes, reason: str, level: Any) -> None:
    (tmp_path / "text").write_bytes(content)
    sentence = rf"^{tmp_path}/text cannot be read as text \({reason}\): name a UTF-8 file with dataset.path$"
    with pytest.raises(data.DataError, match=sentence):
        data.text_file(str(tmp_path / "text"), level)


# ------------------------------------------------------------------------------------------------ options and YAML


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("sequence", 0, "must be at least 1, got 0"),
        ("sequence", 1000, "must be less than the 230 tokens of the train text, got 1000"),
        ("max_vocabulary", 1, "must be at least 2 or null, got 1"),
        ("augment", "standard", "must be none for a text, got 'standard'"),
        ("batch_size", 0, "must be at least 1, got 0"),
        ("batch_size", 500, "must be at most the 76 examples that are left to train on, got 500"),
        ("limit_train", 0.0, "must be above 0 and at most 1, got 0.0"),
        ("limit_val", 1e-3, "must leave at least one of the 8 examples, got 0.001"),
        ("files", {"valid": "x"}, "must name files for train, val and test, got one for 'valid'"),
    ],
)
def test_values_out_of_range_end_in_a_sentence_that_begins_with_the_option(
    tmp_path: Path, name: str, value: Any, sentence: str
) -> None:
    write_wikitext(tmp_path)
    with pytest.raises(ValueError) as error:
        data.wikitext2(str(tmp_path), **SMALL | {name: value})
    assert str(error.value).startswith(f"{name} {sentence}")


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"level": "line"}, "level must be word or character, got 'line'"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "val_fraction and test_fraction must leave some text"),
        ({"test_fraction": 0.0}, "test_fraction must be between 0 and 1, both excluded, got 0.0"),
    ],
)
def test_options_of_a_file_are_refused_before_it_is_read(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        data.text_file("absent", **options)


@pytest.mark.parametrize("name", ["wikitext2", "wikitext103", "text_file"])
def test_every_option_stands_in_the_yaml_with_its_default(name: str) -> None:
    node = OmegaConf.load(ROOT / "configs" / "dataset" / f"{name}.yaml")
    assert node.pop("_target_") == f"data.{name}"
    parameters = inspect.signature(getattr(data, name)).parameters
    assert set(node) == set(parameters) - INJECTED
    defaults = {key: p.default for key, p in parameters.items() if key in node and p.default is not p.empty}
    assert {key for key, default in defaults.items() if node[key] != default} <= {"eval_batch_size"}
