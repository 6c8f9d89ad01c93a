from __future__ import annotations

import fcntl
import shutil

import pytest
import torch

from dts_fast.errors import DTSError
from dts_fast.journal import Journal

TENSORS = {"s": torch.arange(3.0)}


def interrupted(target, key, *steps):
    def run():
        with Journal(target, key) as journal:
            for step in steps:
                journal.put("fit", step, TENSORS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


def test_an_interrupted_run_finds_its_steps(tmp_path):
    target = tmp_path / "out"
    interrupted(target, {"rank": 1}, "a")
    with Journal(target, {"rank": 1}) as journal:
        assert torch.equal(journal.get("fit", "a")["s"], TENSORS["s"])
        assert journal.get("fit", "b") is None
        assert journal.get("spectrum", "a") is None
    assert list(tmp_path.iterdir()) == []


def test_another_run_does_not(tmp_path):
    interrupted(tmp_path / "out", {"rank": 1}, "a")
    with Journal(tmp_path / "out", {"rank": 2}) as journal:
        assert journal.get("fit", "a") is None


def test_a_damaged_step_is_done_again(tmp_path):
    interrupted(tmp_path / "out", {}, "a")
    next((tmp_path / ".out.partial").glob("*.safetensors")).write_bytes(b"half")
    with Journal(tmp_path / "out", {}) as journal:
        assert journal.get("fit", "a") is None


def test_two_runs_at_a_time_do_not_share_it(tmp_path):
    with Journal(tmp_path / "out", {}) as first:
        first.put("fit", "a", TENSORS)
        with Journal(tmp_path / "out", {}) as second:
            assert second.get("fit", "a") is None
            second.put("fit", "b", TENSORS)
        assert first.get("fit", "a") is not None
        assert first.get("fit", "b") is None


@pytest.mark.parametrize(("error", "kept"), [(DTSError("bad input"), False), (RuntimeError("out of memory"), True)])
def test_what_is_kept_after_an_error(tmp_path, error, kept):
    def run():
        with Journal(tmp_path / "out", {}) as journal:
            journal.put("fit", "a", TENSORS)
            raise error

    with pytest.raises(type(error)):
        run()
    assert (tmp_path / ".out.partial").exists() == kept


def test_a_place_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    with Journal(tmp_path / "file" / "out", {}) as journal:
        journal.put("fit", "a", TENSORS)
        assert journal.get("fit", "a") is None


def test_a_lock_on_a_removed_journal_is_worth_nothing(tmp_path, monkeypatch):
    """Between opening and locking, another run ends and a third begins."""
    real = fcntl.flock

    def flock(file, operation):
        shutil.rmtree(tmp_path / ".out.partial")
        monkeypatch.setattr(fcntl, "flock", real)
        Journal(tmp_path / "out", {"rank": 2}).put("fit", "a", TENSORS)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Journal(tmp_path / "out", {"rank": 1}) as journal:
        assert journal.get("fit", "a") is None
        assert journal.folder is None
