"""TokenBuffers: rows of several batches stored contiguously, and batches of other shapes."""

import pytest
import torch

from hf_ft_ext.kernel.engines.buffers import TokenBuffers, concatenated


def batches(*rows: int, width: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, width) for n in rows]


def put(buffers: TokenBuffers, sources: list[torch.Tensor], sizes: list[tuple[int, int]], keep) -> list[torch.Tensor]:
    parts = []
    for source, size in zip(sources, sizes, strict=True):
        buffers.begin(*size)
        parts.append(buffers.put("name", source, keep(source)))
    return parts


def every(source: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(source))


@pytest.mark.parametrize("chunk", [0, 2**26])
def test_rows_of_every_token_are_joined_without_a_copy(chunk, monkeypatch):
    monkeypatch.setattr("hf_ft_ext.kernel.engines.buffers._CHUNK", chunk)
    sources = batches(6, 4, 5)
    parts = put(TokenBuffers(15, 6), sources, [(6, 2), (4, 2), (5, 2)], every)
    assert all(torch.equal(part, source) for part, source in zip(parts, sources, strict=True))
    whole = concatenated(parts)
    assert torch.equal(whole, torch.cat(sources)) and whole.data_ptr() == parts[0].data_ptr()
    assert int(parts[0].untyped_storage().nbytes()) == (chunk or 15 * 3 * 4)  # and nothing is taken in vain
    assert concatenated(parts[1:]).data_ptr() == parts[1].data_ptr()


def test_small_buffers_share_large_chunks(monkeypatch):
    """Long-lived buffers come from large chunks, so that they do not fragment the heap."""
    monkeypatch.setattr("hf_ft_ext.kernel.engines.buffers._CHUNK", 256)
    buffers, sources = TokenBuffers(4, 4), [*batches(4, 4, width=3), *batches(4, width=40), *batches(4, 4, width=5)]
    sources[1] = sources[1].double()
    buffers.begin(4, 4)
    found = [buffers.put(str(i), source, every(source)) for i, source in enumerate(sources)]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, sources, strict=True))
    assert all(part.data_ptr() % 64 == 0 for part in found)
    storages = [part.untyped_storage().data_ptr() for part in found]
    assert [storages.index(storage) for storage in storages] == [0, 0, 2, 3, 3]  # 48 + 96 of 256 bytes, 640, 80 + 80
    assert [int(part.untyped_storage().nbytes()) for part in found] == [256, 256, 640, 256, 256]


def test_buffers_fit_one_row_per_example_and_several_uses_of_a_layer():
    for rows, sizes in (([2, 2, 1], [(7, 2), (3, 2), (5, 1)]), ([14, 6, 10], [(7, 2), (3, 2), (5, 1)])):
        sources = batches(*rows)
        parts = put(TokenBuffers(15, 5), sources, sizes, every)
        assert concatenated(parts).data_ptr() == parts[0].data_ptr()
        assert torch.equal(concatenated(parts), torch.cat(sources))


def test_rows_beyond_the_buffer_are_stored_separately():
    sources = batches(6, 4)
    parts = put(TokenBuffers(13, 5), sources, [(7, 3), (6, 2)], lambda s: every(s)[:5] if len(s) == 6 else every(s))
    assert torch.equal(parts[0], sources[0][:5]) and torch.equal(parts[1], sources[1])
    assert torch.equal(concatenated(parts), torch.cat(parts)) and concatenated(parts).data_ptr() != parts[0].data_ptr()
    buffers = TokenBuffers(4, 4)
    buffers.begin(2, 2)
    narrow, wide = torch.randn(2, 3), torch.randn(2, 5)
    assert torch.equal(buffers.put("name", narrow, every(narrow)), narrow)
    assert torch.equal(buffers.put("name", wide, every(wide)), wide)


def test_chosen_rows_of_some_batches_and_none_of_others():
    sources = batches(6, 4, 5)
    parts = put(TokenBuffers(15, 6), sources, [(6, 2), (4, 2), (5, 2)], lambda s: every(s)[: 0 if len(s) == 4 else 2])
    assert [len(part) for part in parts] == [2, 0, 2]
    assert torch.equal(concatenated(parts), torch.cat([sources[0][:2], sources[2][:2]]))


def test_parts_of_other_order_or_layout_are_copied():
    whole = torch.randn(6, 4)
    parts = [whole[:2], whole[2:6]]
    assert concatenated(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(concatenated(parts[::-1]), torch.cat(parts[::-1]))
    columns = [whole[:, :2], whole[:, 2:]]
    assert torch.equal(concatenated(columns), torch.cat(columns))
    assert concatenated([whole]).data_ptr() == whole.data_ptr()
