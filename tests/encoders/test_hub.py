"""Published weights: held against their hashes, and never waited for without end."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time

import pytest

from avsep.encoders.hub import HubModel, _within
from avsep.errors import MissingWeightsError

REVISION = "65a5785d9156231087c481e0c7dd33a5ff6f7e3e"
MODEL = HubModel("microsoft/resnet-18", REVISION, "Apache-2.0")
CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def _filled(folder, revision=REVISION, stated=SHA256, content=CONTENT):
    """As ``hf download --local-dir`` leaves a folder."""
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    (notes / "model.safetensors.metadata").write_text(f"{revision}\n{stated}\n1700000000.0\n")
    return folder


def test_a_downloaded_folder_is_held_against_its_notes(tmp_path):
    assert MODEL.locate(_filled(tmp_path / "good")) == tmp_path / "good"
    with pytest.raises(MissingWeightsError, match=r"model.safetensors is damaged or was changed .*hf download"):
        MODEL.locate(_filled(tmp_path / "changed", content=CONTENT[:-1] + b"x"))
    with pytest.raises(MissingWeightsError, match=r"has revision 0000aaaa, not 65a5785d"):
        MODEL.locate(_filled(tmp_path / "other", revision="0000aaaa" + REVISION[8:]))
    # a small file of a repository has the hash of git, which says nothing of its SHA-256
    MODEL.locate(_filled(tmp_path / "git", stated=hashlib.sha1(CONTENT).hexdigest()))


def test_a_file_of_the_hubs_cache_is_held_against_its_name(tmp_path):
    for name, content in (("good", CONTENT), ("bad", b"something else")):
        folder = tmp_path / name
        folder.mkdir()
        (tmp_path / f"{name}-blobs").mkdir()
        (tmp_path / f"{name}-blobs" / SHA256).write_bytes(content)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").symlink_to(tmp_path / f"{name}-blobs" / SHA256)
    MODEL.locate(tmp_path / "good")
    with pytest.raises(MissingWeightsError, match="damaged or was changed"):
        MODEL.locate(tmp_path / "bad")


def test_nobody_waits_longer_than_the_limit():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0.2 s"):
        _within(0.2, lambda: time.sleep(5))
    assert time.monotonic() - started < 2
    assert _within(5, lambda: 7) == 7
    with pytest.raises(KeyError):
        _within(5, lambda: {}["x"])


def test_a_hub_that_never_answers_is_given_up_at_once(tmp_path):
    """A proxy takes the connection and says nothing."""
    pytest.importorskip("huggingface_hub")
    code = (
        "import time, sys\nimport huggingface_hub\nfrom avsep.encoders.hub import HubModel\n"
        f"started = time.monotonic()\ntry:\n    HubModel('microsoft/resnet-18', {REVISION!r}, '').locate()\n"
        "except Exception as error:\n    print(type(error).__name__, time.monotonic() - started, error)\n"
    )
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "AVSEP_WEIGHTS")}
        environment = {**kept, "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    name, seconds, message = done.stdout.split(" ", 2)
    assert name == "MissingWeightsError"
    assert float(seconds) < 10  # 2.5, and what importing takes on a busy machine
    assert "within 2.5 s" in message or "timed out" in message.lower()
