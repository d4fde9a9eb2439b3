import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import weakref

import pytest
import torch

from fasttune import checkpoint
from fasttune.checkpoint import (
    check_same_tensors,
    damage,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from fasttune.errors import CheckpointError, StorageError


def _groups(step, size=8):
    generator = torch.Generator().manual_seed(step)
    return {
        "trainable": {"a.lora_A": torch.randn(size, 3, generator=generator)},
        "optimizer": {
            "a.lora_A/exp_avg": torch.randn(size, 3, generator=generator).to(torch.bfloat16),
            "a.lora_A/step": torch.tensor(float(step)),
        },
        "ema": {},
    }


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key])


def test_round_trip_is_bitwise_and_keeps_dtypes(tmp_path):
    groups = _groups(5)
    path = save_checkpoint(tmp_path, 5, groups, {"optimizer": {"lr": 0.1}})
    back = load_checkpoint(path)
    assert back.step == 5 and back.state["optimizer"] == {"lr": 0.1}
    assert set(back.groups) == {"trainable", "optimizer"}
    for name, tensors in back.groups.items():
        assert_same(tensors, groups[name])


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "json", "no_json", "empty"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, caplog, harm):
    save_checkpoint(tmp_path, 10, _groups(10), {})
    newest = save_checkpoint(tmp_path, 20, _groups(20), {})
    weights = newest / "trainable.safetensors"
    if harm == "truncate":
        os.truncate(weights, weights.stat().st_size - 4)
    elif harm == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif harm == "remove":
        weights.unlink()
    elif harm == "json":
        (newest / "state.json").write_text('{"format": 1, "ste')
    elif harm == "no_json":
        (newest / "state.json").unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    assert damage(newest)
    assert find_checkpoint(tmp_path, "latest").step == 10
    assert str(newest) in caplog.text
    with pytest.raises(CheckpointError, match="step-000020"):
        find_checkpoint(tmp_path, str(newest))
    again = save_checkpoint(tmp_path, 20, _groups(20), {})  # training reaches step 20 once more
    assert damage(again) is None and len(list_checkpoints(tmp_path)) == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_all_damaged_or_none_is_an_error_not_a_restart(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        find_checkpoint(tmp_path / "absent", "latest")
    path = save_checkpoint(tmp_path, 1, _groups(1), {})
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        find_checkpoint(tmp_path, "latest")


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 999999, 1000000):
        save_checkpoint(tmp_path, step, _groups(step), {})
    prune_checkpoints(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    prune_checkpoints(tmp_path, 0)
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_full_disk_leaves_earlier_checkpoints_and_no_remains(tmp_path, monkeypatch):
    first = save_checkpoint(tmp_path, 1, _groups(1), {})

    flushed = []

    def full(descriptor):
        flushed.append(descriptor)
        if len(flushed) > 1:  # the first file fits, the second does not
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"step-000002.*No space left.*Earlier .* intact"):
        save_checkpoint(tmp_path, 2, _groups(2), {})
    assert os.listdir(tmp_path) == [first.name] and damage(first) is None


def test_one_tensor_at_a_time_is_in_host_memory(tmp_path, monkeypatch):
    """Copies to the host of a whole network's state would be tens of GB at once."""
    alive, most, contiguous = [], [], torch.Tensor.contiguous

    def watched(tensor):
        most.append(sum(copy() is not None for copy in alive))
        copy = contiguous(tensor)
        alive.append(weakref.ref(copy))
        return copy

    groups = {"trainable": {f"{i}": torch.randn(4, 8).T for i in range(5)}}
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", watched)
        path = save_checkpoint(tmp_path, 1, groups, {})
    assert len(alive) == 5 and max(most) == 0
    assert_same(load_checkpoint(path).groups["trainable"], groups["trainable"])


def test_bytes_are_read_once_before_loading(tmp_path, monkeypatch):
    paths = [save_checkpoint(tmp_path, step, _groups(step), {}) for step in (1, 2)]
    checked, crc32 = [], checkpoint._crc32
    monkeypatch.setattr(checkpoint, "_crc32", lambda path: checked.append(path) or crc32(path))
    assert find_checkpoint(tmp_path, "latest").step == 2
    assert sorted(checked) == sorted(paths[1].glob("*.safetensors"))


def test_another_model_is_refused_with_names(tmp_path):
    saved = {"a": torch.zeros(2), "b": torch.zeros(2)}
    current = {"a": torch.zeros(3), "c": torch.zeros(2)}
    with pytest.raises(CheckpointError) as error:
        check_same_tensors(tmp_path, saved, current)
    assert all(
        text in str(error.value)
        for text in ("c is missing", "b is not trained", "a has shape (2,) instead of (3,)")
    )
    check_same_tensors(tmp_path, saved, dict(saved))


def test_sigkill_while_writing_never_leaves_half_a_checkpoint(tmp_path):
    """A process that writes checkpoints in a loop is killed at six moments; whatever is there under a
    final name must be whole. It is a copy of one that has imported everything."""
    program = textwrap.dedent("""
        import os, sys, torch
        from pathlib import Path
        from fasttune.checkpoint import save_checkpoint, prune_checkpoints
        root = Path(sys.argv[1])
        torch.set_num_threads(1)
        groups = {"trainable": {"w": torch.randn(1 << 20)}, "optimizer": {"m": torch.randn(1 << 20)}}
        for line in sys.stdin:
            process = os.fork()
            if process:
                print(process, flush=True)
                os.waitpid(process, 0)
                print("ended", flush=True)
                continue
            for step in range(int(line), int(line) + 10000):
                save_checkpoint(root, step, groups, {})
                prune_checkpoints(root, 2)
    """)
    start = 1
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as parent:
        for kill in range(6):
            parent.stdin.write(f"{start}\n")
            process = int(parent.stdout.readline())
            time.sleep(0.05 + 0.037 * kill)
            os.kill(process, signal.SIGKILL)
            assert parent.stdout.readline() == "ended\n"
            paths = list_checkpoints(tmp_path)
            assert all(damage(path) is None for path in paths)
            assert len(paths) <= 3
            if paths:
                start = json.loads((paths[-1] / "state.json").read_text())["step"] + 1
    assert start > 1
