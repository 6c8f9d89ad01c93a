from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import fine_tuned, plain_tensors, write_checkpoint
from safetensors.torch import load_file, save_file
from test_checkpoint import write_sharded

from dts_fast import DTSConfig, compress
from dts_fast.checkpoint import Checkpoint
from dts_fast.cli import main
from dts_fast.dense import average, write_like
from dts_fast.errors import CheckpointError, DTSError
from dts_fast.export import export_full
from dts_fast.verify import verify


def test_a_stack_that_is_held_in_part_is_not_written(tmp_path):
    like = Checkpoint.open(write_checkpoint(tmp_path / "base", plain_tensors()))
    added = {f"new.experts[{expert},0/1]": torch.randn(4, 6) for expert in (0, 2)}
    with pytest.raises(DTSError, match=r"'new.experts' is neither in the base nor whole in the adapter, which lacks"):
        write_like(like, tmp_path / "out", like.get, added=added)
    assert not (tmp_path / "out").exists()
    write_like(like, tmp_path / "out", like.get, added=added | {"new.experts[1,0/1]": torch.randn(4, 6)})
    assert Checkpoint.open(tmp_path / "out", stacks=True).get("new.experts").shape == (3, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_average_is_the_mean_in_the_first_ones_files_and_dtypes(tmp_path, dtype):
    models = [
        {n: t.to(dtype) if t.is_floating_point() else t for n, t in fine_tuned(plain_tensors(), seed=s).items()}
        for s in range(3)
    ]
    paths = [write_sharded(tmp_path / f"m{i}", m, shards=2) for i, m in enumerate(models)]
    average(paths, tmp_path / "mean")
    assert sorted(f.name for f in (tmp_path / "mean").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    mean = Checkpoint.open(tmp_path / "mean")
    for name, first in models[0].items():
        expected = first
        if first.is_floating_point():
            expected = (sum(m[name].double() for m in models) / 3).to(dtype)
        torch.testing.assert_close(mean.get(name), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_deltas_from_a_mean(tmp_path):
    """The paper's DTS-D from end to end: every fine-tune is compressed against the mean of all."""
    base = write_checkpoint(tmp_path / "base", plain_tensors())
    tuned = [
        write_checkpoint(tmp_path / f"t{s}", fine_tuned(load_file(base / "model.safetensors"), seed=s)) for s in (1, 2)
    ]
    result = CliRunner().invoke(main, ["average", *map(str, tuned), "--out-path", str(tmp_path / "mean")])
    assert result.exit_code == 0, result.output
    compress(base, tuned[0], tmp_path / "a", DTSConfig(density=0.5, reference=str(tmp_path / "mean")))
    assert verify(tmp_path / "a", tmp_path / "mean", tuned[0]).matches


def test_checkpoints_that_differ_have_no_mean(tmp_path):
    a = write_checkpoint(tmp_path / "a", plain_tensors())
    b = write_checkpoint(tmp_path / "b", plain_tensors() | {"conv.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"1 tensors \(first: conv\.weight"):
        average([a, b], tmp_path / "mean")
    with pytest.raises(CheckpointError, match="two or more"):
        average([a], tmp_path / "mean")
    average([a, a], tmp_path / "mean")
    with pytest.raises(DTSError, match="exists already"):
        average([a, a], tmp_path / "mean")


def test_what_is_read_is_not_overwritten(tmp_path, checkpoints):
    base, tuned = checkpoints
    compress(base, tuned, tmp_path / "a", DTSConfig(rank=2))
    before = sorted((f.name, f.read_bytes()) for f in base.iterdir())
    with pytest.raises(DTSError, match="is what is read"):
        export_full(tmp_path / "a", base, base, overwrite=True)
    for target in (base, tuned):
        with pytest.raises(DTSError, match="is what is read"):
            average([base, tuned], target, overwrite=True)
    assert sorted((f.name, f.read_bytes()) for f in base.iterdir()) == before


def test_only_what_belongs_to_a_model_is_copied(tmp_path, checkpoints):
    base, tuned = checkpoints
    for name in ("tokenizer.json", "merges.txt", "notes.txt", "training_log.json", "optimizer.bin"):
        (base / name).write_text("{}")
    compress(base, tuned, tmp_path / "a", DTSConfig(density=0.5))
    export_full(tmp_path / "a", base, tmp_path / "dense")
    assert {f.name for f in (tmp_path / "dense").iterdir()} == {
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
    }


MEASURE = """
import resource, sys
from dts_fast import DTSConfig, compress
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compress(sys.argv[1], sys.argv[2], sys.argv[3], DTSConfig(density=0.02, method=sys.argv[4]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("method", ["paper", "refined"])
def test_memory_is_a_few_tensors_however_large_the_checkpoint(tmp_path, method):
    """A checkpoint of 15 matrices must not take much more than one of 3."""
    peaks = {}
    rows, columns = 512, 2048
    matrix = rows * columns * 4  # bytes
    for count in (3, 15):
        for kind in ("base", "tuned"):
            folder = tmp_path / f"{kind}{count}"
            folder.mkdir()
            for i in range(count):
                generator = torch.Generator().manual_seed(i + (kind == "tuned"))
                save_file(
                    {f"layer{i}.weight": torch.randn(512, 2048, generator=generator)}, folder / f"{i}.safetensors"
                )
            index = ", ".join(f'"layer{i}.weight": "{i}.safetensors"' for i in range(count))
            (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
        paths = (str(tmp_path / f"{kind}{count}") for kind in ("base", "tuned", "adapter"))
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *paths, method],
            capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        peaks[count] = int(done.stdout)
    # 12 more matrices on either side are 24 x 4 MiB; what grows is the adapter's codes and the allocator's slack.
    assert peaks[15] - peaks[3] < 3 * matrix, {count: f"{peak / matrix:.1f} matrices" for count, peak in peaks.items()}
