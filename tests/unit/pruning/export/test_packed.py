import json
import math
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from wandazeta.pruning.export.packed import load_packed, main, pack_2of4, restore_plain, unpack_2of4, write_packed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.dtype])


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def random_2of4(rows, width, dtype, seed=0):
    """Any bits at all where a weight is kept: NaN, infinities, subnormals, -0.0."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.finfo(dtype).bits
    whole = torch.randint(-(2 ** (size - 1)), 2 ** (size - 1), (rows, width), generator=generator)
    weight = whole.to(INTEGERS[dtype]).view(dtype)
    order = torch.rand(rows, width // 4, 4, generator=generator).argsort(-1)
    mask = (order < 2).reshape(rows, width)
    return torch.where(mask, weight, torch.zeros((), dtype=dtype)), mask


def reference(weight, mask):
    """Values and index bytes, value by value."""
    values, positions = [], []
    for row, kept in zip(bits(weight).tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), 4):
            chosen = [i for i in range(4) if kept[start + i]]
            values += [row[start + i] for i in chosen]
            positions += chosen
    packed = bytearray(math.ceil(len(positions) / 4))
    for number, position in enumerate(positions):
        packed[number // 4] |= position << 2 * (number % 4)
    return values, list(packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (5, 12), (16, 64), (0, 8)])
def test_equals_a_packer_of_plain_loops_and_comes_back_bit_for_bit(dtype, shape):
    for seed in range(5):
        weight, mask = random_2of4(*shape, dtype, seed)
        values, indices = pack_2of4(weight, mask)
        expected_values, expected_indices = reference(weight, mask)
        assert (values.shape, values.dtype, indices.dtype) == ((shape[0], shape[1] // 2), dtype, torch.uint8)
        assert bits(values).flatten().tolist() == expected_values
        assert indices.tolist() == expected_indices
        assert same(unpack_2of4(values, indices, shape), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_among_the_kept_keep_their_sign(dtype):
    weight = torch.tensor([[0.0, -0.0, 0.0, 1.0], [-0.0, 0.0, -0.0, 0.0], [0.0, 0.0, 0.0, 2.0]], dtype=dtype)
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    assert same(unpack_2of4(*pack_2of4(weight, mask), (3, 4)), weight)
    # the mask may name fewer than two of a group
    for mask in (weight.signbit() | (weight != 0), torch.zeros(3, 4, dtype=torch.bool)):
        clean = torch.where(mask, weight, torch.zeros((), dtype=dtype))
        values, indices = pack_2of4(clean, mask)
        assert same(unpack_2of4(values, indices, (3, 4)), clean)
        # filled up to two, still in order, as sparse kernels want them
        pairs = [byte >> shift & 15 for byte in indices.tolist() for shift in (0, 4)][:3]
        assert all(pair & 3 < pair >> 2 for pair in pairs)


def test_a_view_with_other_strides_is_packed_like_its_copy():
    weight, mask = random_2of4(6, 8, torch.float32)
    views = weight.t().contiguous().t(), mask.t().contiguous().t()
    assert not views[0].is_contiguous()
    for got, expected in zip(pack_2of4(*views), pack_2of4(weight, mask), strict=True):
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_what_cannot_be_packed_is_refused():
    weight, mask = random_2of4(4, 8, torch.float32)
    with pytest.raises(ValueError, match="at most 2 of every 4"):
        pack_2of4(weight, torch.ones_like(mask))
    for removed in (1.0, -0.0):
        with pytest.raises(ValueError, match=r"`weight` to be \+0\.0 wherever"):
            pack_2of4(torch.where(mask, weight, torch.tensor(removed)), mask)
    for bad in ((weight[:, :6], mask[:, :6]), (weight, mask[:2]), (weight, mask.int()), (weight[0], mask[0])):
        with pytest.raises(ValueError, match="only 2:4 weights can be packed"):
            pack_2of4(*bad)
    values, indices = pack_2of4(weight, mask)
    for bad in ((values, indices, (8, 4)), (values, indices[:2], (4, 8)), (values[:2], indices, (4, 8))):
        with pytest.raises(ValueError, match="`shape` to fit values and indices"):
            unpack_2of4(*bad)


def save_model(folder, num_shards=1, dtype=torch.bfloat16):
    """A directory as `prune` writes it: of every kind of tensor one, in shards or not."""
    up, up_mask = random_2of4(12, 20, dtype, 1)
    conv, conv_mask = random_2of4(6, 12, dtype, 2)
    # three experts of 2 rows
    experts, experts_mask = (tensor.view(3, 2, 20) for tensor in random_2of4(6, 20, dtype, 3))
    tensors = {
        "embed.weight": torch.randn(7, 5).to(dtype),
        "layers.0.up.weight": up,
        # Conv1D keeps (in, out)
        "layers.0.conv.weight": conv.t().contiguous(),
        "layers.0.experts.up_proj": experts,
        "layers.0.experts.down_proj": experts.mT.contiguous(),
        "layers.0.norm.weight": torch.randn(3),
        "layers.0.flag": torch.tensor([True, False, True]),
        "positions": torch.arange(3),
        "scale": torch.tensor(0.5, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    masks = {
        "layers.0.up.weight": up_mask,
        "layers.0.conv.weight": conv_mask.t().contiguous(),
        "layers.0.experts.up_proj": experts_mask,
        "layers.0.experts.down_proj": experts_mask.mT.contiguous(),
    }
    folder.mkdir()
    names = list(tensors)
    for shard in range(num_shards):
        part = {name: tensors[name] for name in names[shard::num_shards]}
        name = "model" if num_shards == 1 else f"model-{shard + 1:05d}-of-{num_shards:05d}"
        save_file(part, folder / f"{name}.safetensors", metadata={"format": "pt"})
    if num_shards > 1:
        (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "sparsity").mkdir()
    save_file(masks, folder / "sparsity/masks.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "note.txt").write_text("kept")
    return tensors, masks


def equal_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        flat = [tensor[name].contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
        assert torch.equal(*flat), name


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_directory_comes_back_bit_for_bit(tmp_path, num_shards, dtype):
    tensors, masks = save_model(tmp_path / "model", num_shards, dtype)
    path = write_packed(tmp_path / "model")
    assert path == tmp_path / "model" / "sparsity/model.2of4.safetensors"
    for place in (path, tmp_path / "model"):
        equal_tensors(load_packed(place), tensors)
    # any reader of safetensors reads it, and the size is the formula's, to the byte
    stored = load_file(path)
    assert stored.keys() == (tensors.keys() - masks.keys()) | {
        f"{name}.{part}" for name in masks for part in ("values", "indices")
    }
    expected = sum(tensor.nbytes for name, tensor in tensors.items() if name not in masks)
    expected += sum(tensors[name].nbytes // 2 + math.ceil(tensors[name].numel() / 8) for name in masks)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert len(content) == 8 + length + expected
    # a reader that maps the file finds every tensor at a multiple of its element's size
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % stored[name].itemsize == 0 for name in stored)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_plain_directory_is_restored_from_what_was_shipped(tmp_path, num_shards, capsys):
    tensors, _ = save_model(tmp_path / "model", num_shards)
    write_packed(tmp_path / "model")
    for path in (tmp_path / "model").rglob("m*.safetensors"):
        if path.name != "model.2of4.safetensors":
            path.unlink()
    main([str(tmp_path / "model"), str(tmp_path / "new" / "plain")])
    assert str(tmp_path / "new" / "plain") in capsys.readouterr().out
    restored = sorted(
        str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*") if path.is_file()
    )
    assert restored == ["plain/config.json", "plain/extra/note.txt", "plain/model.safetensors"]
    equal_tensors(load_file(tmp_path / "new" / "plain" / "model.safetensors"), tensors)


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"to hold `model\.safetensors`"):
        write_packed(tmp_path)
    _, masks = save_model(tmp_path / "model")
    for bad, message in (
        ({"layers.0.up.weight": ~torch.zeros(12, 20, dtype=torch.bool)}, "only models pruned with sparsity_pattern"),
        ({"layers.0.norm.weight": torch.ones(3, dtype=torch.bool)}, "only models pruned with sparsity_pattern"),
        ({"layers.1.up.weight": masks["layers.0.up.weight"].clone()}, "holds none for `layers.1.up.weight`"),
    ):
        save_file(masks | bad, tmp_path / "model" / "sparsity/masks.safetensors")
        with pytest.raises(ValueError, match=message):
            write_packed(tmp_path / "model")
    (tmp_path / "model" / "sparsity/masks.safetensors").unlink()
    with pytest.raises(ValueError, match=r"masks\.safetensors' to be a file that can be read"):
        write_packed(tmp_path / "model")
    assert not (tmp_path / "model" / "sparsity/model.2of4.safetensors").exists()
    with pytest.raises(ValueError, match=r"model\.2of4\.safetensors' to be a file that can be read"):
        load_packed(tmp_path / "model")
    with pytest.raises(ValueError, match="packed file of version 1, but got pattern None"):
        load_packed(tmp_path / "model" / "model.safetensors")


def test_damage_and_other_versions_are_told(tmp_path):
    save_model(tmp_path / "model")
    path = write_packed(tmp_path / "model")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="to be a complete safetensors file"):
        load_packed(path)
    note = json.dumps({"version": 2, "pattern": "2:4", "weights": {}})
    save_file({"a": torch.ones(1)}, path, metadata={"wandazeta": note})
    with pytest.raises(ValueError, match="packed file of version 1, but got pattern '2:4' and version 2"):
        load_packed(path)


def test_a_target_that_cannot_be_filled_is_refused(tmp_path):
    save_model(tmp_path / "model")
    write_packed(tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for source, target, message in (
        ("model", "full", "new or empty folder"),
        ("model", "model", "to be a folder outside the source"),
        ("model", "model/extra/plain", "to be a folder outside the source"),
        ("model/sparsity/model.2of4.safetensors", "new", "`source` to be a directory"),
        ("full", "new", r"model\.2of4\.safetensors' to be a file"),
    ):
        with pytest.raises(ValueError, match=message):
            restore_plain(tmp_path / source, tmp_path / target)
        assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="error: Expected argument `target`"):
        main([str(tmp_path / "model"), str(tmp_path / "full")])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
