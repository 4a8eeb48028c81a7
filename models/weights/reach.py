"""Whether what is published can be had: found out in seconds, where packages try for a minute."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PATIENCE = 5.0  # seconds within which a server answers
SILENCE = 20.0  # seconds without a byte after which a download is given up


def require_answer(url: str) -> None:
    """See that a server answers, whatever it says.

    Args:
        url: an address there.

    Raises:
        OSError: it does not, within ``PATIENCE``.
    """
    host = url.partition("//")[2].partition("/")[0]
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:  # an answer
        return
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise OSError(f"{host} cannot be reached: {getattr(why, 'strerror', None) or why}") from error


@contextmanager
def torch_hub(url: str) -> Iterator[None]:
    """Within it, torch's own downloads end when the server is silent.

    Args:
        url: of the file that is wanted, which may lie in torch's folder already.

    Raises:
        OSError: it does not, and its server does not answer.
    """
    if not (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file():
        require_answer(url)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def hugging_face() -> Iterator[None]:
    """Within it, what lies in the cache of Hugging Face's hub is taken where the hub does not answer, at once.

    Raises:
        OSError: it does not answer, and what was wanted does not lie there.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield
        return
    try:
        require_answer(constants.ENDPOINT)
    except OSError as unreachable:
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise OSError(f"{unreachable}, and they are not in {constants.HF_HUB_CACHE}") from error
        finally:
            constants.HF_HUB_OFFLINE = False
    else:
        yield
