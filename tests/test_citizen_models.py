"""Models of every make convert whole: attention, one-dimensional convolutions, other people's layers."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import sparsekit as sk
from sparsekit.export import to_prune
from sparsekit.flops import positions
from sparsekit.nn import SparseConv1d, SparseModule, SparseMultiheadAttention, dense_state

FORMATS = ["dense", "compact", "csr", "bsr"]


def masked(model, masks):
    """The dense model with the same weights pruned."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def same(got, want):
    if want is None or got is None:
        assert got is want
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def round_trip(model, fast, masks):
    """Masks, keys and bits are those of the dense model; a dense state dict loads."""
    want = masked(model, masks).state_dict()
    held = sk.masks_of(fast)
    assert held.keys() == masks.keys() and all(torch.equal(held[name], mask) for name, mask in masks.items())
    for state in (sk.to_dense(fast).state_dict(), dense_state(fast)):
        assert list(state) == list(want)
        assert all(torch.equal(state[name], tensor) for name, tensor in want.items())
    other = copy.deepcopy(fast)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(tensor, want[name]) for name, tensor in dense_state(other).items())


# ---- convolutions in one dimension ------------------------------------------------------------------

GEOMETRIES = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "same": {"dilation": 2, "padding": "same"},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "groups": {"groups": 2, "bias": False},
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv1d(fmt, name):
    if fmt == "compact" and name == "groups":
        pytest.skip("compact runs no groups")
    dense = nn.Conv1d(4, 8, 3, **GEOMETRIES[name]).double()
    mask = torch.rand(dense.weight.shape) < 0.4
    mask[2] = False
    sparse = SparseConv1d.from_dense(dense, mask, fmt)
    dense = masked(dense, {"weight": mask})
    assert sparse.extra_repr().startswith(dense.extra_repr().partition(", bias")[0])
    for size in ((3, 4, 9), (4, 9), (0, 4, 9)):
        x = torch.randn(size, dtype=torch.float64)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = sparse(ours), dense(theirs)
        same(y, want)
        dense.zero_grad()
        sparse.zero_grad()
        y.square().sum().backward()
        want.square().sum().backward()
        same(ours.grad, theirs.grad)
        same(sparse.values.grad, sparse.pack(dense.weight.grad * mask))
    sparse.load_state_dict(dense.state_dict())
    other = SparseConv1d.from_dense(dense, mask, "csr")
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other.weight, dense.weight) and torch.equal(sparse.survivors(), mask)
    for bad in (torch.zeros(2, 3, 9), torch.zeros(4), torch.zeros(1, 2, 4, 9)):
        with pytest.raises(ValueError, match=r"SparseConv1d: Expected an input of shape \[N, 4, L\], got"):
            sparse(bad)
    with pytest.raises(RuntimeError, match=r"weight: Expected a weight of shape \[8, .*, 3\], got \[8, 4\]"):
        sparse.load_state_dict({"weight": torch.zeros(8, 4)}, strict=False)


def test_geometries_of_one_entry_are_for_all_axes():
    dense = nn.Conv2d(3, 4, 3, stride=(2,), padding=(1,), dilation=(2,))
    sparse = sk.SparseConv2d.from_dense(dense, torch.ones(4, 3, 3, 3) > 0)
    x = torch.randn(2, 3, 9, 8)
    same(sparse(input=x), dense(input=x))
    with pytest.raises(ValueError, match=r"SparseConv2d: Expected 2 entries of a geometry, got \(1, 1, 1\)"):
        sk.SparseConv2d(3, 4, 3, stride=(1, 1, 1))


def test_conv1d_in_a_model():
    model = nn.Sequential(nn.Conv1d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 4, 1))
    masks, x = sk.prune(model, 0.7), torch.randn(2, 3, 40)
    for example in (None, x):
        fast = sk.convert(model, masks, example)
        same(fast(x), masked(model, masks)(x))
        assert [layer.shape for layer in sk.explain(fast).layers] == [(16, 3, 5), (4, 16, 1)]
    round_trip(model, fast, masks)


# ---- attention --------------------------------------------------------------------------------------


def calls(length, batch, heads):
    """Arguments beside query, key and value, with keys padded and positions barred."""
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, -1] = True
    causal = nn.Transformer.generate_square_subsequent_mask(length)
    each = torch.rand(batch * heads, length, length) < 0.2
    each[:, :, 0] = False
    return {
        "plain": {},
        "no weights": {"need_weights": False},
        "weights of each head": {"average_attn_weights": False},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True, "need_weights": False},
        "causal, padded": {"attn_mask": causal, "key_padding_mask": padding.float(), "is_causal": True},
        "each head": {"attn_mask": each, "key_padding_mask": padding},
    }


@pytest.mark.parametrize("impl", ["auto", "dense", "csr"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention(impl, batch_first, bias):
    model = nn.MultiheadAttention(16, 4, batch_first=batch_first, bias=bias)
    if bias:
        nn.init.normal_(model.in_proj_bias)
    masks = sk.prune(model, 0.5, scope="layer")
    assert list(masks) == ["in_proj_weight", "out_proj.weight"]
    fast, dense = sk.convert(model, masks, impl=impl), masked(model, masks)
    assert type(fast) is SparseMultiheadAttention and isinstance(fast.in_proj, SparseModule)
    x, other = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    if not batch_first:
        x, other = x.transpose(0, 1), other.transpose(0, 1)
    for arguments in calls(5, 3, 4).values():
        for training in (True, False):
            fast.train(training), dense.train(training)
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            got, want = fast(ours, ours, ours, **arguments), dense(theirs, theirs, theirs, **arguments)
            same(got[0], want[0])
            same(got[1], want[1])
            same(*(torch.autograd.grad(y[0].square().sum(), v)[0] for y, v in ((got, ours), (want, theirs))))
            with torch.no_grad():
                same(fast(x, x, x, **arguments)[0], dense(x, x, x, **arguments)[0])
    same(fast(x, other, other)[0], dense(x, other, other)[0])
    one = x[:, 0]
    same(fast(one, one, one)[0], dense(one, one, one)[0])
    with pytest.raises(ValueError, match="Expected attn_mask beside is_causal=True"):
        fast(x, x, x, is_causal=True)
    round_trip(model, fast, masks)


def test_attention_with_one_projection_pruned():
    model = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2)})
    x, masks = torch.randn(5, 3, 8), sk.prune(model, 0.5, scope="layer")
    for name, mask in masks.items():
        fast = sk.convert(model, {name: mask}, impl="csr")
        same(fast.attend(x, x, x)[0], masked(model, {name: mask}).attend(x, x, x)[0])
        round_trip(model, fast, {name: mask})
        again = sk.convert(fast, sk.prune(fast, 0.6, scope="layer"), impl={"attend.in_proj": "csr"})
        assert list(sk.masks_of(again)) == list(masks)
        assert sk.to_dense(again).state_dict().keys() == model.state_dict().keys()


def test_attention_through_torch_prune_and_back():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0))
    x, masks = torch.randn(5, 3, 8), sk.prune(model, 0.5, scope="layer")
    pruned = to_prune(sk.convert(model, masks, impl="csr"))
    assert "0.self_attn.in_proj_weight_mask" in pruned.state_dict()
    assert {name: mask.sum() for name, mask in sk.prune(pruned, 0.0).items()} == {n: m.sum() for n, m in masks.items()}
    fast = sk.convert(pruned, impl="csr")
    same(fast(x), masked(model, masks)(x))
    round_trip(model, fast, masks)


def test_attention_dropout_trains_and_rests():
    model = nn.MultiheadAttention(8, 2, dropout=0.5)
    fast, x = sk.convert(model, sk.prune(model, 0.5), impl="csr"), torch.randn(5, 3, 8)
    for arguments in ({}, {"need_weights": False}):
        assert not torch.equal(fast.train()(x, x, x, **arguments)[0], fast(x, x, x, **arguments)[0])
        assert torch.equal(fast.eval()(x, x, x, **arguments)[0], fast(x, x, x, **arguments)[0])


@pytest.fixture
def no_dense_view(monkeypatch):
    """Layers whose dense weight nobody may read."""

    def forbid():
        monkeypatch.setattr(SparseModule, "weight", property(lambda _: pytest.fail("the dense weight was read")))

    return forbid


@pytest.mark.parametrize("only", ["", "linear1", "self_attn"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own use of them
def test_fast_paths_of_encoders_stay_away(only, no_dense_view):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    masks = {name: mask for name, mask in sk.prune(model, 0.6, scope="layer").items() if only in name}
    fast, dense = sk.convert(model, masks, torch.randn(2, 5, 16), impl="csr"), masked(model, masks)
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, -2:] = True
    with torch.no_grad():
        want, padded = dense(x), dense(x, src_key_padding_mask=padding)
    round_trip(model, fast, masks)
    back = sk.to_dense(fast)
    for one, other in ((back, model), (back.layers[0], model.layers[0])):
        for switch in ("use_nested_tensor", "activation_relu_or_gelu"):
            assert getattr(one, switch, None) == getattr(other, switch, None)
    no_dense_view()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            same(fast(x), want)
            same(fast(x, src_key_padding_mask=padding)[~padding], padded[~padding])
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_transformer_is_measured_on_its_own_inputs():
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    fast = sk.convert(model, sk.prune(model, 0.5, scope="layer"), torch.randn(2, 5, 16))
    assert {layer.name: layer.input_shape for layer in sk.explain(fast).layers} == {
        "self_attn.in_proj": (2, 5, 16),
        "self_attn.out_proj": (2, 5, 16),
        "linear1": (2, 5, 16),
        "linear2": (2, 5, 32),
    }


def test_compiled_encoder():
    torch._dynamo.reset()
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    fast = sk.convert(model, sk.prune(model, 0.5, scope="layer"), impl="csr")
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 7):
        x = torch.randn(n, 5, 16)
        same(compiled(x), fast(x))
    graph = torch.fx.symbolic_trace(nn.Sequential(fast.linear1, fast.linear2))
    same(graph(x), fast.linear2(fast.linear1(x)))


def test_tickets_of_a_transformer():
    """Rounds keep the names of torch's parameters: late rewinding finds the optimizer state of both projections."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x, seen = torch.randn(4, 5, 16), []
    search = sk.tickets(model, rounds=2, rate=0.5, rewind="2it", impl="csr", example_inputs=x)
    for round_ in search:
        optimizer = torch.optim.AdamW(round_.model.parameters(), 1e-2, weight_decay=0.1)
        start = round_.begin(optimizer)
        if round_.number:
            assert set(round_.model.parameters()) == {*optimizer.state}
        for _ in range(start, 5):
            optimizer.zero_grad()
            round_.model(x).square().mean().backward()
            optimizer.step()
            round_.step()
        seen.append((start, round_.density))
    assert [start for start, _ in seen] == [0, 2, 2]
    assert seen[-1][1] == pytest.approx(0.25, abs=0.01)
    assert all(line["speedup"] > 0 for line in search.summary["rounds"])  # the ledger's masked rival runs too


def test_work_of_attention_is_counted():
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(4, 5, 16)
    fast = sk.convert(model, sk.prune(model, 0.5, scope="layer"), impl="csr")
    assert positions(model, x) == positions(fast, x) == dict.fromkeys(sk.prunable(model), 20)


# ---- what cannot be pruned says why -----------------------------------------------------------------


def lazy(materialised):
    layer = nn.LazyLinear(4)
    if materialised:
        layer(torch.zeros(1, 6))
    return layer


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(6, 4))


REFUSED = {
    "3-D": (lambda: nn.Conv3d(2, 3, 1), "no sparse kernel for convolutions in three dimensions"),
    "lazy": (lambda: lazy(False), "lazy; the first batch makes its weight"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(6, 4)), "parametrized; torch.*remove_param"),
    "weight_norm": (old_weight_norm, "under weight_norm; torch.*remove_weight_norm"),
    "subclass": (lambda: type("Mine", (nn.Linear,), {})(6, 4), "not a plain torch layer"),
    "kdim": (lambda: nn.MultiheadAttention(8, 2, kdim=4), "not a plain torch attention over one width"),
    "bias_k": (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "bias_k, bias_v or add_zero_attn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, reason = REFUSED[name]
    model = nn.ModuleDict({"odd": make(), "plain": nn.Linear(2, 2)})
    assert list(sk.prunable(model)) == ["plain.weight"]
    (why,) = (layer.rejected["sparse"] for layer in sk.explain(model).layers if layer.name == "odd")
    assert why == reason or why.startswith(reason.partition(".*")[0])
    if "odd.weight" in model.state_dict() or name in ("parametrized", "weight_norm"):
        with pytest.raises(ValueError, match=f"odd.weight: Expected a mask for a layer that .* {reason}"):
            sk.convert(model, {"odd.weight": torch.ones(4, 6) > 0})


def test_folded_and_materialised_layers_convert():
    folded = parametrizations.weight_norm(nn.Linear(6, 4))
    nn.utils.parametrize.remove_parametrizations(folded, "weight")
    for layer in (folded, nn.utils.remove_weight_norm(old_weight_norm()), lazy(True)):
        model = nn.Sequential(layer)
        masks, x = sk.prune(model, 0.5), torch.randn(2, 6)
        fast = sk.convert(model, masks, impl="csr")
        same(fast(x), masked(model, masks)(x))


@pytest.mark.parametrize("impl", ["auto", "csr"])
def test_decoders_prune_the_output_of_their_attention_to_the_encoder(impl):
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
    names = [name for name in sk.prunable(model) if "multihead_attn" in name]
    assert names == ["decoder.layers.0.multihead_attn.out_proj.weight"]
    masks = sk.prune(model, 0.5, scope="layer")
    fast, dense = sk.convert(model, masks, x, impl=impl), masked(model, masks)
    for training in (True, False):
        same(fast.train(training)(*x), dense.train(training)(*x))
    assert list(sk.prunable(fast)) == list(sk.prunable(model))
    assert positions(fast, x) == positions(model, x) and positions(model, x)[names[0]] == 12
    for one, layer in ((fast, "multihead_attn.in_proj"), (model, "multihead_attn")):
        (why,) = (row.rejected["sparse"] for row in sk.explain(one).layers if row.name == f"decoder.layers.0.{layer}")
        assert why == "queries have another input than keys and values; the output projection alone can be pruned"
    round_trip(model, fast, masks)


# ---- Hugging Face -----------------------------------------------------------------------------------


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    words = {"input_ids": torch.randint(0, 50, (2, 7))}
    if name == "bert":
        config = transformers.BertConfig(vocab_size=50, **small)
        return transformers.BertForSequenceClassification(config), words, ()
    if name == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=4, **small)
        return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}, ()
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config), words, ("lm_head",)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_hugging_face_models_convert_fully(name, tmp_path):
    model, inputs, exclude = hugging_face(name)
    model.eval()
    masks = sk.prune(model, 0.6, exclude=exclude)
    kinds = ("Linear", "Conv1D", "Conv2d")
    matrices = {f"{path}.weight" for path, module in model.named_modules() if type(module).__name__ in kinds}
    assert set(masks) == matrices - {"lm_head.weight"}
    for impl in ("auto", "csr"):
        fast = sk.convert(model, masks, inputs, training=True, impl=impl)
        same(fast(**inputs).logits, masked(model, masks)(**inputs).logits)
    round_trip(model, fast, masks)
    sk.save(fast, tmp_path / "ticket.safetensors")
    same(sk.load(tmp_path / "ticket.safetensors", model)(**inputs).logits, fast(**inputs).logits)
    if name == "gpt2":
        with pytest.raises(ValueError, match="lm_head.weight: Expected a weight of its own.*leave it dense by exc"):
            sk.convert(model, sk.prune(model, 0.5))


def test_patterns_of_transposed_weights_mean_outputs_by_inputs():
    model, _, exclude = hugging_face("gpt2")
    masks = sk.prune(model, 0.75, "block:8x1", exclude=exclude)
    mask = masks["transformer.h.0.attn.c_attn.weight"]  # [in, out]
    assert set(mask.t().reshape(6, 8, 16).float().mean(1).unique().tolist()) == {0.0, 1.0}
