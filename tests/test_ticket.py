"""The search for tickets: rounds and masks, and what a round starts from."""

import json
import math
import random
import warnings
from itertools import pairwise

import numpy
import pytest
import torch
import torch.nn.functional as F
from ticket_nets import X, Y, adam, assert_equal, dataset, mlp, net, run, search, sgd, train
from torch import nn

import sparsekit as sk
from sparsekit import files, models
from sparsekit.nn import SparseModule, dense_state
from sparsekit.ticket.rewind import Rewind, Snapshot, decode, encode, set_rng

pytestmark = pytest.mark.usefixtures("one_thread")


# Rounds and masks


def test_one_dense_round_and_then_as_many_as_asked_for():
    seen, found = run(rounds=3)
    assert [r.number for r, *_ in seen] == [0, 1, 2, 3] == [row["round"] for row in found.summary["rounds"]]
    assert not seen[0][0].masks and seen[0][0].density == 1
    assert not any(isinstance(m, SparseModule) for m in seen[0][0].model.modules())
    assert sum(isinstance(m, SparseModule) for m in seen[1][0].model.modules()) == 3


def test_densities_are_those_of_the_paper():
    model = models.build("lenet-300-100", seed=0)
    rounds = search(model, 9, rate=models.rates("lenet-300-100"))
    left = {r.number: r.density for r in rounds}
    assert {k: round(100 * left[k], 1) for k in (1, 3, 7, 9)} == {1: 80.0, 3: 51.3, 7: 21.1, 9: 13.5}
    rows = {layer["name"]: layer["density"] for layer in rounds.summary["rounds"][9]["layers"]}
    assert rows == pytest.approx({"fc1": 0.8**9, "fc2": 0.8**9, "fc3": 0.9**9}, abs=1e-3)


def test_the_given_model_is_not_touched():
    model = net().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    run(model, rewind="3it")
    assert_equal(model.state_dict(), state)
    assert [type(m) for m in model.modules()] == classes and not model.training
    assert all(p.grad is None for p in model.parameters())


def test_asking_for_tickets_leaves_the_generators_alone():
    model, before = net(), torch.get_rng_state()
    search(model, criterion="random")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", [{}, {"scope": "global"}, {"pattern": "block:4x1"}, {"criterion": "random"}])
def test_masks_are_nested_and_counted(how):
    seen, found = run(rounds=3, rate=0.3, **how)
    for (before, *_), (round_, *_) in pairwise(seen):
        earlier = before.masks
        for name, mask in round_.masks.items():
            assert not (mask & ~earlier.get(name, torch.ones_like(mask))).any()
    for round_, _, _ in seen:
        alive = sum(int(mask.sum()) for mask in round_.masks.values()) or 36 + 1024 + 48
        assert round_.density == pytest.approx(alive / (36 + 1024 + 48))
        assert found.summary["rounds"][round_.number]["density"] == round_.density
    assert seen[3][0].density == pytest.approx(0.7**3, abs=0.03)


def test_global_scope_takes_the_smallest_of_all_layers():
    model = mlp(20, 10, 5)
    with torch.no_grad():
        model.fc1.weight.mul_(1e-3)
    *_, round_ = search(model, 1, rate=0.5, scope="global")
    assert int(round_.masks["fc1.weight"].sum()) == 200 - 125 and "fc2.weight" in round_.masks
    assert bool(round_.masks["fc2.weight"].all())


def test_one_shot():
    *_, (round_, _, _) = run(rounds=1, rate=0.9)[0]
    assert round_.number == 1 and {n: int(m.sum()) for n, m in round_.masks.items()} == {
        "0.weight": 4,
        "5.weight": 102,
        "7.weight": 5,
    }


@pytest.mark.parametrize("kind", ["geometric", "cubic", "linear"])
def test_rates_by_round(kind):
    found = search(rounds=None, rate=sk.schedule({"*": 0.2, "7": 0.5}, 3, kind))
    left = [round_.masks for round_ in found]
    assert len(left) == 4 and {n: int(m.sum()) for n, m in left[3].items()} == pytest.approx(
        {"0.weight": 0.2 * 36, "5.weight": 0.2 * 1024, "7.weight": 0.5 * 48}, abs=2
    )
    assert found.config["rate"] == sk.schedule({"*": 0.2, "7": 0.5}, 3, kind) and found.config["rounds"] == 3
    with pytest.raises(ValueError, match="Expected a rate for each of 2 rounds, got 3"):
        search(rounds=2, rate=[0.1] * 3)


def test_criteria_that_ask_for_the_first_weights_and_data():
    model = net()
    for criterion, of in (("movement", lambda w, w0: (w - w0).abs()), ("large_init", lambda w, w0: w0.abs())):
        (dense, _, _), (round_, _, _) = run(model, 1, rate=0.5, criterion=criterion)[0]
        scores = of(dense_state(dense.model)["5.weight"], model[5].weight.detach())
        kept = round_.masks["5.weight"]
        assert scores[kept].min() >= scores[~kept].max()
    seen, found = run(model, 2, rate=0.5, criterion="snip", data=iter([(X[:20], Y[:20]), (X[20:], Y[20:])]), least=1)
    assert seen[2][0].density == pytest.approx(0.25, abs=0.01) and found.config["least"] == 1
    with pytest.raises(ValueError, match="Expected data=, a batch"):
        search(criterion="snip")


def test_pruning_at_initialisation():
    model, batch = net(), (X, Y)
    for criterion, data in (("magnitude", None), ("snip", batch), ("synflow", batch)):
        how = {"criterion": criterion, "data": data, "scope": "layer"}
        seen, _ = run(model, 1, rate=0.5, score_at="init", **how)
        assert_equal(seen[1][0].masks, sk.prune(model, 0.5, **how))
    lr = run(model, 1, rate=0.5, score_at="init", rewind="lr")[0]
    want = dense_state(lr[0][0].model)["5.weight"] * lr[1][0].masks["5.weight"]
    assert torch.equal(lr[1][1]["5.weight"], want)  # scored at the first weights, trained on from the last
    with pytest.raises(ValueError, match="Expected score_at 'end' or 'init', got 'begin'"):
        search(score_at="begin")


def test_tied_weights_are_refused_before_training_unless_they_stay():
    tied = nn.Sequential(net(), nn.Linear(3, 3), twin := nn.Linear(3, 3))
    twin.weight = tied[1].weight
    with pytest.raises(ValueError, match=r"1.weight: Expected a weight of its own, got one shared by 1.weight and"):
        search(tied)
    for how in ({"exclude": ["1", "2"]}, {"rate": {"*": 0.5, "1": 0.0, "2": 0.0}}):
        assert len(list(search(tied, **how))) == 3


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"least": -1}, {"example_inputs": X[:, :, :3]}, {"example_inputs": 3}])
def test_what_only_pruned_rounds_need_is_checked_before_training(wrong, tmp_path):
    with pytest.raises(ValueError, match=rf"Expected {next(iter(wrong))} "):
        search(net(), run_dir=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_a_loss_is_a_function():
    with pytest.raises(TypeError, match=r"Expected loss as a function of \(output, y\), got str"):
        search(net(), criterion="snip", data=(X, Y), loss="cross_entropy")


def test_rates_by_layer_and_layers_left_out():
    seen, _ = run(rounds=1, rate={"*": 0.5, "7": 0.25}, exclude="5")
    masks = seen[1][0].masks
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 18, "7.weight": 36}
    assert isinstance(seen[1][0].model[5], nn.Linear)
    assert seen[1][0].density == pytest.approx((18 + 36) / (36 + 48))


def test_exclude_may_be_any_iterable():
    seen, found = run(rounds=1, exclude=(name for name in ["5", "7.weight"]))
    assert list(seen[1][0].masks) == ["0.weight"] and found.config["exclude"] == ["5", "7.weight"]


@pytest.mark.parametrize("pattern", ["block:8x1", "channel", "2:4"])
def test_patterns_hold_in_every_round(pattern):
    seen, found = run(mlp(16, 32, 8, 16), 1 if pattern == "2:4" else 2, steps=0, rate=0.3, pattern=pattern)
    for round_, _, _ in seen[1:]:
        assert all(sk.Pattern.parse(pattern).holds(mask) for mask in round_.masks.values())
        assert round_.density < 0.8
    assert found.config["pattern"] == pattern


def test_a_criterion_of_ones_own():
    def closest_to_one(layer):
        return -(layer.weight - 1).abs()

    model = mlp(4, 6, 3)
    *_, round_ = (found := search(model, 1, rate=0.5, criterion=closest_to_one))
    weight = model.fc1.weight.detach()
    kept = round_.masks["fc1.weight"]
    assert int(kept.sum()) == 12 and (weight[kept] - 1).abs().max() <= (weight[~kept] - 1).abs().min()
    assert found.config["criterion"] == "closest_to_one"


def test_pruned_weights_are_exactly_zero_after_training_and_in_the_files(tmp_path):
    seen, _ = run(run_dir=tmp_path / "run", make=lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.5))
    for round_, _, _ in seen[1:]:
        state = dense_state(round_.model)
        kept, masks, _ = sk.export.read_portable(
            tmp_path / "run" / f"round_{round_.number:02d}" / "trained.safetensors"
        )
        assert_equal(masks, round_.masks)
        for name, mask in round_.masks.items():
            assert not state[name][~mask].any() and state[name][mask].any()
        assert_equal(kept, state)


# Rewinding


def test_init_gives_survivors_their_first_values_back():
    model = net()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for round_, before, _ in run(model)[0][1:]:
        for name, tensor in before.items():
            want = first[name] * round_.masks[name] if name in round_.masks else first[name]
            assert torch.equal(tensor, want), name
        assert before["1.num_batches_tracked"] == 0


@pytest.mark.parametrize("rewind", ["3it", "1ep", "4it"])
@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("impl", ["csr", "dense"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_step_is_gone_back_to_exactly(tmp_path, rewind, make, impl, on_disk):
    at = 4 if rewind == "4it" else 3
    seen = {}

    for round_ in search(rewind=rewind, impl=impl, run_dir=tmp_path / "run" if on_disk else None):

        def spy(step, model, optimizer, scheduler, round_=round_):
            if step == at:
                owner = {id(m.values): f"{n}.weight" for n, m in model.named_modules() if isinstance(m, SparseModule)}
                names = {id(p): owner.get(id(p), n) for n, p in model.named_parameters()}
                layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, SparseModule)}
                moments = {
                    (names[id(p)], key): value.clone()
                    for p, values in optimizer.state.items()
                    for key, value in values.items()
                }
                groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
                rng = torch.rand(()).item(), random.random(), numpy.random.rand()  # noqa: NPY002 - the global one
                schedule = scheduler.state_dict()
                seen[round_.number] = dense_state(model), layers, moments, groups, rng, schedule, round_.masks

        torch.rand(round_.number), random.random()  # noise before begin() is of no account
        train(round_, make=make, spy=spy)
        assert round_.steps == 6

    state, _, moments, groups, rng, schedule, _ = seen[0]
    assert any(value.any() for value in moments.values()) and schedule["last_epoch"] == at
    for number in (1, 2):
        state_n, layers, moments_n, groups_n, rng_n, schedule_n, masks = seen[number]
        assert (groups_n, rng_n, schedule_n) == (groups, rng, schedule)
        assert state_n.keys() == state.keys() and moments_n.keys() == moments.keys()
        for name in state:
            assert torch.equal(state_n[name], state[name] * masks[name] if name in masks else state[name]), name
        for (name, key), value in moments_n.items():
            want = moments[name, key]
            if name in layers and want.dim():
                want = layers[name].pack(want)
            assert torch.equal(value, want), (name, key)


def test_rewound_without_pruning_a_round_repeats_the_dense_one():
    """Nothing pruned, everything rewound: each round ends in the same bits, dropout and batch norm included."""
    for rewind in ("init", "2it", "1ep"):
        seen, _ = run(rate=0.0, rewind=rewind, rounds=1)
        assert_equal(dense_state(seen[1][0].model), dense_state(seen[0][0].model))


def test_lr_keeps_the_weights_and_replays_the_schedule():
    seen, _ = run(rewind="lr")
    for (earlier, *_), (round_, before, optimizer) in pairwise(seen):
        trained = dense_state(earlier.model)
        for name, tensor in before.items():
            want = trained[name] * round_.masks[name] if name in round_.masks else trained[name]
            assert torch.equal(tensor, want), name
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
        assert round_.steps == 6


def test_none_goes_on_with_weights_rates_and_noise():
    noise, found = [], search(rewind="none")
    for round_ in found:
        noise.append(torch.rand(()).item())
        before = dense_state(round_.model)
        if round_.number:
            for name, mask in round_.masks.items():
                assert torch.equal(before[name], trained[name] * mask)  # noqa: F821 - of the round before
            optimizer = sgd(round_.model)
            round_.begin(optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5))
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
        train(round_)
        trained = dense_state(round_.model)  # noqa: F841
        after = torch.get_rng_state()
        expected = torch.rand(()).item()
        torch.set_rng_state(after)
        noise.append(expected)
    assert noise[2] == noise[1] and noise[4] == noise[3] and len({noise[0], noise[1], noise[3]}) == 3


def test_init_starts_every_round_with_the_same_noise():
    noise = []
    for round_ in search():
        noise.append((torch.rand(3).tolist(), random.random(), numpy.random.rand()))  # noqa: NPY002
        train(round_)
    assert noise[0] == noise[1] == noise[2]


def test_begin_does_not_wind_the_noise_back_when_it_is_not_asked_to():
    later = []
    for round_ in search():
        torch.rand(1)
        round_.begin(sgd(round_.model))
        later.append(torch.rand(1).item())
    assert later[0] == later[1] == later[2]


def test_the_data_order_depends_on_the_epoch_alone():
    orders = [[r.permutation(50, e).tolist() for e in range(3)] for r in search()]
    assert orders[0] == orders[1] == orders[2]
    assert orders[0][0] != orders[0][1] and sorted(orders[0][0]) == list(range(50))


def test_param_groups_and_named_parameters():
    def make(model):
        groups = [{"params": [(n, p)], "lr": 0.1 / (i + 1)} for i, (n, p) in enumerate(model.named_parameters())]
        return torch.optim.SGD(groups, momentum=0.9)

    seen, _ = run(rewind="2it", make=make)
    sparse = seen[2][2]
    assert [g["param_names"] for g in sparse.param_groups] == [[n] for n, _ in seen[2][0].model.named_parameters()]
    assert [g["lr"] for g in sparse.param_groups] == [g["lr"] for g in seen[0][2].param_groups]


def test_rewinding_needs_begin(tmp_path):
    with pytest.raises(
        ValueError, match=r"Expected round\.begin\(optimizer, scheduler\).* got no begin\(\) in round 0"
    ):
        for _ in search(rewind="3it", run_dir=tmp_path / "run"):
            pass
    assert not (tmp_path / "run" / "round_00").exists()
    with pytest.raises(ValueError, match=r"in round 1"):
        for round_ in search(rewind="3it"):
            if not round_.number:
                train(round_)


def test_rewinding_needs_to_get_there():
    with pytest.raises(ValueError, match=r"rewind point '9it', step 9, got 6 calls of round\.step"):
        run(rewind="9it")
    with pytest.raises(ValueError, match=r"steps_per_epoch"):
        for round_ in search(rewind="2ep"):
            round_.begin(sgd(round_.model))


def test_an_optimizer_of_another_model_is_refused():
    model = net()
    for round_ in search(model):
        with pytest.raises(
            ValueError, match=r"Expected an optimizer over round\.model's parameters, got 7 of 7 others"
        ):
            round_.begin(sgd(model))
        break


@pytest.mark.parametrize("rewind", ["2it", "none"])
def test_other_parameter_groups_are_refused(rewind):
    with pytest.raises(ValueError, match="Expected 1 parameter groups"):
        for round_ in search(rewind=rewind):
            if round_.number:
                parameters = list(round_.model.parameters())
                round_.begin(torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1))
            train(round_)


def test_a_scheduler_that_cannot_be_kept_is_refused_before_training():
    class Strange(torch.optim.lr_scheduler.StepLR):
        def state_dict(self):
            return {"thing": object()}

    for round_ in search(rewind="2it"):
        optimizer = sgd(round_.model)
        with pytest.raises(TypeError, match="Expected plain values and tensors in the training state, got object"):
            round_.begin(optimizer, Strange(optimizer, 1))
        break


@pytest.mark.parametrize("text", ["", "5", "it", "-1it", "1.5ep", "5 it", "LR", 5, None])
def test_rewinds_that_are_none(text):
    with pytest.raises(ValueError, match="Expected rewind 'init', '500it'"):
        Rewind.parse(text)


def test_generator_states_survive_their_file(tmp_path):
    snapshot = Snapshot.take(0, nn.Linear(2, 2))
    files.write_tensors(tmp_path / "a", *snapshot.to_tensors())
    drawn = [(torch.rand(()).item(), random.gauss(0, 1), numpy.random.standard_normal()) for _ in range(3)]  # noqa: NPY002
    set_rng(Snapshot.from_tensors(*files.read_tensors(tmp_path / "a")).rng)
    assert drawn == [(torch.rand(()).item(), random.gauss(0, 1), numpy.random.standard_normal()) for _ in range(3)]  # noqa: NPY002


def test_encode_keeps_types_and_bits():
    value = {1: (2.5, None, True, [math.inf]), "t": torch.arange(3), "d": {"x": -0.0}}
    tensors = {}
    text = json.dumps(encode(value, tensors))
    got = decode(json.loads(text), tensors)
    assert torch.equal(got.pop("t"), value.pop("t")) and got == value and type(got[1]) is tuple


# Anyone's loop


def test_with_a_data_loader_of_ones_own(tmp_path):
    data = dataset()
    train_set = torch.utils.data.TensorDataset(data.train_x, data.train_y)
    model = nn.Sequential(nn.Flatten(), mlp(16, 64, 32, 3))
    found = sk.tickets(model, rounds=3, rate=0.3, rewind="1ep", run_dir=tmp_path, example_inputs=data.train_x[:25])
    orders = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for round_ in found:
            loader = torch.utils.data.DataLoader(train_set, batch_size=25, shuffle=True)
            optimizer = torch.optim.Adam(round_.model.parameters(), lr=1e-2)
            start = round_.begin(optimizer, steps_per_epoch=len(loader))
            seen = []
            for _ in range(start // len(loader), 4):
                for x, y in loader:
                    seen.append(y)
                    optimizer.zero_grad()
                    F.cross_entropy(round_.model(x), y).backward()
                    optimizer.step()
                    round_.step()
            orders.append(torch.cat(seen))
            with torch.no_grad():
                accuracy = (round_.model(data.test_x).argmax(1) == data.test_y).float().mean()
            round_.record(test_accuracy=accuracy)
    assert len(orders[0]) == 800 and len(orders[1]) == 600
    assert all(torch.equal(order, orders[0][200:]) for order in orders[1:])  # the epochs after the rewind point again
    rows = found.summary["rounds"]
    assert min(row["test_accuracy"] for row in rows) > 0.6
    assert [row["steps"] for row in rows] == [32, 24, 24, 24] and found.summary["total"]["speedup"] > 0
