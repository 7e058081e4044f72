"""Tiles that were measured: found with a stand-in for the clock, kept in the user's cache, used, refused with a message."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimlm.core.errors import KernelError
from slimlm.core.parts.pack import Parts
from slimlm.runtime.gpu import device, layout, products, tile_search, tiles
from slimlm.runtime.gpu.layout import Packed
from slimlm.runtime.gpu.tile_search import TRIED, Call, CountedWeight, Finding, Search, neighbours, search_tiles, weights_of
from slimlm.runtime.gpu.tiles import GpuModel, Kind, Table, Tile
from slimlm.runtime.linear import CompressedLinear
from tests.fake_cuda import FakeCuda
from tests.runtime.gpu.layers import REASON, WHERE, codes, pruned

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
HALF = torch.float16


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.forget_tables()
    yield
    tiles.forget_tables()


def packed(out: int = 128, width: int = 256) -> Packed:
    return layout.lay_out(CompressedLinear.from_parts(Parts(pruned(codes((out, width), "per-tensor"))), None).stored()).base


def test_what_was_written_is_read_and_used_on_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "NVIDIA H100 80GB")
    monkeypatch.setattr(tiles, "gpu_model", lambda where: GpuModel((9, 0), 132))
    weight, own = packed(), Tile(64, 16, 4, 2, 1)
    assert tiles.tile_of(weight, 9, 128, GPU, HALF) == tiles.tile_for(9, 128, (9, 0)) != own
    kind = Kind.of(weight, HALF)
    path = tiles.write("NVIDIA H100 80GB", Table({tiles.key(kind, 9): own}, {str(kind): 64}))
    assert path.name == "NVIDIA-H100-80GB.json"
    tiles.forget_tables()
    assert tiles.tile_of(weight, 9, 128, GPU, HALF) == tiles.tile_of(weight, 16, 128, GPU, HALF) == own
    assert tiles.tile_of(weight, 8, 128, GPU, HALF) == tiles.tile_for(8, 128, (9, 0))
    assert tiles.tile_of(weight, 9, 128, GPU, torch.bfloat16) == tiles.tile_for(9, 128, (9, 0)), "of another dtype"
    assert tiles.fused_up_to(weight, GPU, HALF) == 64 and tiles.fused_up_to(weight, CPU, HALF) == tiles.FUSED_UP_TO


def test_a_tile_that_a_layer_has_no_rows_for_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed()
    table = Table({tiles.key(Kind.of(weight, HALF), 1): Tile(128, 8, 2, 3, 4)})
    with tiles.using(CPU, table):
        assert tiles.tile_of(weight, 1, 128, CPU, HALF).rows == 128 and tiles.tile_of(weight, 1, 64, CPU, HALF).rows == 64
    assert tiles.tile_of(weight, 1, 128, CPU, HALF).rows == 64


def test_what_another_version_measured_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.write("a GPU", Table({"x": Tile(64, 8, 2, 3, 4)}))
    monkeypatch.setattr(tiles, "triton_version", lambda: "3.99")
    assert tiles.read("a GPU") == Table()


@pytest.mark.parametrize("text", ["", "[]", None])
def test_a_damaged_file_is_said_with_what_to_do(text: str | None) -> None:
    path = tiles.write("a GPU", Table())
    if text is None:
        path.write_text(json.dumps({"versions": tiles.versions(), "tiles": {"x": {"rows": 1}}, "fused_up_to": {}}))
    else:
        path.write_text(text)
    with pytest.raises(KernelError, match=r"measured for a GPU cannot be read .*; delete that file, or measure again"):
        tiles.read("a GPU")


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(KernelError, match="the measured tiles cannot be written"):
        tiles.write("a GPU", Table())


def test_every_kind_and_batch_has_its_key() -> None:
    small, large = Kind.of(packed(), HALF), Kind("2:4", "float16", True)
    keys = {tiles.key(kind, batch) for kind in (small, large) for batch in range(1, 257)}
    assert len(keys) == 2 * len(tiles.BATCHES)
    assert tiles.key(small, 17) == "2:4, float16, small, batch 32"


@pytest.mark.skipif(REASON is not None, reason=f"no GPU kernels: {REASON}")
def test_the_fastest_tile_that_gives_the_same_result_is_found() -> None:
    own = layout.lay_out(CompressedLinear.from_parts(Parts(pruned(codes((64, 512), "per-tensor"))), None).to(WHERE).stored())
    kind, told = str(Kind.of(own.base, HALF)), []

    def clock(calls: Sequence[Call]) -> float:
        """Four warps are slow, few waves fast; unpacked weights win from 9 tokens on."""
        table = tiles.table_of(WHERE)
        if not table.fused_up_to:
            told.append(len(calls))
            return [1.0, 2.0, 2.0, 1.0][len(told) - 1]
        (tile,) = table.tiles.values()
        return (10.0 if tile.warps == 4 else 1.0) * tile.waves

    search = Search(WHERE, torch.float16, clock, batches=(8, 16), tried={"warps": (4,), "waves": (1, 2)})
    table, rows = search_tiles(weights_of([own]), search, lambda *_: None)
    assert [(row.kind, row.batch, row.after.waves, row.after.warps) for row in rows] == [(kind, 8, 1, 2), (kind, 16, 1, 2)]
    assert all(row.seconds_after == 1.0 < row.seconds_before and not row.left_out for row in rows)
    assert table.fused_up_to == {kind: 8} and set(table.tiles) == {f"{kind}, batch 8", f"{kind}, batch 16"}
    assert tiles.table_of(WHERE) == Table(), "what was tried is not in use any more"


@pytest.mark.skipif(REASON is not None, reason=f"no GPU kernels: {REASON}")
def test_tiles_that_cannot_run_or_err_are_left_out_for_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    own = layout.lay_out(CompressedLinear.from_parts(Parts(pruned(codes((64, 256), "per-tensor"))), None).to(WHERE).stored())
    plain = products.product

    def product(x: Tensor, *rest: object) -> Tensor:
        (tile,) = (t for t in tiles.table_of(WHERE).tiles.values())
        if tile.warps == 4:
            raise RuntimeError("out of resource: shared memory")
        return plain(x, *rest) * (1.5 if tile.warps == 8 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "product", product)
    search = Search(WHERE, torch.float16, lambda _: 1.0, batches=(8,), tried={"warps": (4, 8)})
    _, [row] = search_tiles(weights_of([own]), search, lambda *_: None)
    assert row.before == row.after and [words.partition(": ")[2] for words in row.left_out] == [
        "out of resource: shared memory",
        "gives another result",
    ]


@pytest.mark.skipif(REASON is not None, reason=f"no GPU kernels: {REASON}")
def test_a_measured_tile_without_room_for_an_adapter_gives_way_to_the_built_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    weight, large = packed(), Tile(128, 8, 2, 3, 4)
    name, plain, tried = tiles.key(Kind.of(weight, HALF), 1), products.launch, list[Tile]()

    def launched(*given: Any) -> Tensor:
        tried.append(given[-1])
        if given[-1] == large:
            raise OutOfResources(140_000, 101_376, "shared memory")
        return plain(*given)

    monkeypatch.setattr(products, "launch", launched)
    x, counters = torch.ones(1, 256, dtype=HALF, device=WHERE), torch.zeros(8, dtype=torch.int32, device=WHERE)
    weight = dataclasses.replace(weight, words=weight.words.to(WHERE), scale=weight.scale.to(WHERE))
    with tiles.using(WHERE, Table({name: large}), measuring=True), pytest.raises(OutOfResources):
        products.product(x, weight, counters)
    with tiles.using(WHERE, Table({name: large})):
        with pytest.warns(UserWarning, match=r"measured for 2:4, float16, small, batch 8, cannot run here .*shared memory"):
            first = products.product(x, weight, counters)
        assert torch.equal(products.product(x, weight, counters), first), "said once"
        built_in = tiles.tile_of(weight, 1, 128, WHERE, HALF)
    assert tried == [large, large, built_in, built_in]
    monkeypatch.setattr(products, "launch", lambda *given: launched(*given[:-1], large))
    with pytest.raises(OutOfResources):
        products.product(x, weight, counters)


def test_without_a_gpu_tuning_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimlm.bench.gpu_tiles import tune_kernels

    monkeypatch.setattr(device, "refuses", lambda where: "there is no GPU")
    with pytest.raises(KernelError, match="there are no GPU kernels to tune: there is no GPU"):
        tune_kernels("nowhere", report=lambda *_: None, notify=lambda _: None)


def test_layers_that_the_kernels_do_not_take_leave_nothing_to_tune() -> None:
    with pytest.raises(KernelError, match="there is nothing to tune"):
        weights_of([])


def test_only_tiles_of_a_layers_own_rows_and_of_few_enough_tokens_are_tried() -> None:
    first = Tile(64, 8, 2, 3, 4)
    tried = list(neighbours([first], 64, 8))
    assert tried and first not in tried and all(t.rows == 64 and t.tokens <= 16 for t in tried)
    assert {f.name for f in dataclasses.fields(Tile)} == set(TRIED)


def test_the_gpu_that_is_measured_is_the_current_one_meanwhile(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    second, seen = torch.device("cuda", 1), set[torch.device]()

    def finding(kind: Kind, weights: Sequence[CountedWeight], batch: int, *rest: object) -> Finding:
        seen.add(fake_cuda.current)
        own = Tile(64, 8, 2, 3, 4)
        return Finding(str(kind), batch, own, own, 1.0, 1.0, ())

    monkeypatch.setattr(tile_search, "best_tile", finding)
    monkeypatch.setattr(tile_search, "crossing", lambda *rest: 64)
    search_tiles([(packed(), torch.zeros(1))], Search(second, torch.float16, lambda calls: 1.0), lambda *at: None)
    assert seen == {second} and fake_cuda.current == torch.device("cuda", 0)
