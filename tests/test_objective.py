"""The objective against the published losses, its written formula, and autograd."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightly.loss import NTXentLoss, VICRegLoss
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adadim_lightning import AdaDimLoss
from adadim_lightning.functional import barlow_twins_loss, matrix_mutual_information, nt_xent_loss, vicreg_loss
from adadim_lightning.objective import MATCH_EVERY

Views = tuple[Tensor, Tensor, Tensor, Tensor]


def views(n: int = 12, dim_r: int = 10, dim_z: int = 6, dtype: torch.dtype = torch.float32) -> Views:
    """R1, R2, Z1, Z2: two noisy views that need gradients; Z spreads so little that the hinge is active."""
    r, z = torch.randn(n, dim_r), 0.5 * torch.randn(n, dim_z)
    rows = (r, r + 0.3 * torch.randn_like(r), z, z + 0.1 * torch.randn_like(z))
    r1, r2, z1, z2 = (x.to(dtype).requires_grad_() for x in rows)
    return r1, r2, z1, z2


def gradients(loss: Tensor, inputs: Views) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, materialize_grads=True, retain_graph=True))


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_with_alpha_one_and_gamma_zero_it_is_simclr(temperature: float) -> None:
    rows = views()
    ours = AdaDimLoss(alpha=1, gamma=0, kappa=1, temperature=temperature)(*rows).total
    theirs = NTXentLoss(temperature=temperature)(*rows[2:])
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(gradients(ours, rows), gradients(theirs, rows), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dim_z", [6, 30], ids=["more rows than dimensions", "fewer"])
def test_with_alpha_zero_and_gamma_zero_it_is_vicreg(dim_z: int) -> None:
    rows = views(dim_z=dim_z)
    ours = AdaDimLoss(alpha=0, gamma=0, halve_variance=True)(*rows).total
    theirs = VICRegLoss()(*rows[2:])
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(gradients(ours, rows), gradients(theirs, rows), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0])
@pytest.mark.parametrize(("alpha", "gamma", "kappa"), [(0.3, 0.1, 1.0), (0.8, -0.5, 5.0), (0.0, 2.0, 0.1)])
def test_the_total_is_the_written_formula(alpha: float, gamma: float, kappa: float, order: float) -> None:
    rows = views()
    r1, r2, z1, z2 = rows
    loss = AdaDimLoss(
        alpha=alpha,
        gamma=gamma,
        kappa=kappa,
        order=order,
        temperature=0.4,
        invariance_weight=3.0,
        variance_weight=2.0,
        covariance_weight=0.5,
        invariance_reduction="sum",
    )
    loss.set_balance(alpha, phase=0.7)
    written = (
        (1 - alpha)
        * vicreg_loss(
            z1,
            z2,
            invariance_weight=3.0,
            variance_weight=2.0,
            covariance_weight=0.5,
            invariance_reduction="sum",
        )
        + alpha * kappa * nt_xent_loss(z1, z2, temperature=0.4)
        + gamma * 0.7 * matrix_mutual_information(torch.cat([r1, r2]), torch.cat([z1, z2]), order=order)
    )
    total = loss(*rows).total
    torch.testing.assert_close(total, written)
    for ours, reference in zip(gradients(total, rows), gradients(written, rows), strict=True):
        assert bool(torch.isfinite(ours).all())
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-4)


def test_the_weighted_parts_sum_to_the_total_and_all_parts_are_named_and_detached() -> None:
    output = AdaDimLoss(alpha=0.3, kappa=2.0)(*views())
    torch.testing.assert_close(sum(output.weighted.values()), output.total.detach())
    assert set(output.weighted) == {"decorrelation", "uniformity", "information"}
    assert set(output.parts) == {
        "decorrelation",
        "invariance",
        "variance",
        "covariance",
        "uniformity",
        "information",
    }
    assert output.total.requires_grad
    assert not any(x.requires_grad for x in (*output.parts.values(), *output.weighted.values()))


def test_barlow_twins_takes_the_place_of_vicreg() -> None:
    rows = views()
    options = {"decorrelation": "barlow_twins", "redundancy_weight": 0.02, "temperature": 0.5}
    loss = AdaDimLoss(alpha=0.3, gamma=0.0, kappa=1.0, **options)
    output = loss(*rows)
    theirs = barlow_twins_loss(rows[2], rows[3], redundancy_weight=0.02)
    torch.testing.assert_close(output.parts["decorrelation"], theirs.detach())
    torch.testing.assert_close(output.parts["invariance"] + 0.02 * output.parts["redundancy"], theirs.detach())
    assert set(output.parts) == {"decorrelation", "invariance", "redundancy", "uniformity", "information"}
    written = 0.7 * theirs + 0.3 * nt_xent_loss(rows[2], rows[3], temperature=0.5)
    for ours, reference in zip(gradients(output.total, rows), gradients(written, rows), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("above", [True, False])
def test_an_information_below_its_floor_is_not_pressed_further(above: bool) -> None:
    rows = views()
    information = float(matrix_mutual_information(torch.cat(rows[:2]), torch.cat(rows[2:])))
    floor = information - 0.1 if above else information + 0.1
    loss = AdaDimLoss(alpha=1.0, gamma=1.0, information_floor=floor)
    output = loss(*rows)
    assert float(output.parts["information"]) == pytest.approx(information, rel=1e-5)  # as it is
    assert float(output.weighted["information"]) == pytest.approx(max(information, floor), rel=1e-5)
    r_gradient = gradients(output.total, rows)[0]
    assert bool(r_gradient.any()) == above  # nothing but the information depends on R


def test_the_parts_are_unweighted_and_do_not_depend_on_the_balance() -> None:
    rows = views()
    first, second = (AdaDimLoss(alpha=alpha, gamma=1, kappa=3)(*rows).parts for alpha in (0.1, 0.9))
    assert first == second
    recipe = 25 * first["invariance"] + 25 * first["variance"] + first["covariance"]
    torch.testing.assert_close(first["decorrelation"], recipe)
    torch.testing.assert_close(first["uniformity"], nt_xent_loss(rows[2], rows[3]).detach())


@pytest.mark.parametrize("order", [2.0, 1.0])
def test_its_gradient_passes_gradcheck(order: float) -> None:
    loss = AdaDimLoss(alpha=0.4, gamma=-0.7, kappa=2.0, order=order).double()
    rows = views(n=4, dim_r=5, dim_z=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: loss(*x).total, rows)


def norms_at_z(loss: AdaDimLoss, rows: Views) -> tuple[float, float]:
    """Norms of the gradients of decorrelation and uniformity, by plain autograd."""
    _, _, z1, z2 = rows
    parts = (vicreg_loss(z1, z2), nt_xent_loss(z1, z2, temperature=loss.temperature))
    dec, uni = (float(torch.cat(torch.autograd.grad(part, (z1, z2))).norm()) for part in parts)
    return dec, uni


def test_matched_kappa_makes_both_gradients_at_z_equally_long() -> None:
    rows = views()
    loss = AdaDimLoss(gamma=0, kappa="match")
    for _ in range(5):
        loss(*rows)
    dec, uni = norms_at_z(loss, rows)
    assert float(loss.kappa) == pytest.approx(dec / uni, rel=1e-4)
    lengths = []
    for alpha in (0.0, 1.0):
        loss.set_balance(alpha)
        lengths.append(float(torch.cat(gradients(loss(*rows).total, rows)[2:]).norm()))
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)


def test_matched_kappa_follows_a_running_mean_of_every_tenth_norm() -> None:
    loss = AdaDimLoss(kappa="match")
    running = torch.zeros(2, dtype=torch.float64)
    for call in range(31):
        r1, r2, z1, z2 = views()
        scale = (1.0, 3.0, 0.2, 0.7)[call // 10]
        rows = (r1, r2, *((scale * z).detach().requires_grad_() for z in (z1, z2)))
        loss(*rows)
        if call % 10 == 0:
            running = 0.7 * running + 0.3 * torch.tensor(norms_at_z(loss, rows), dtype=torch.float64)
        assert float(loss.kappa) == pytest.approx(float(running[0] / running[1]), rel=1e-4)


def test_a_loss_that_goes_on_compares_the_gradients_when_it_would_have() -> None:
    batches = [views() for _ in range(8)]
    whole, first, second = (AdaDimLoss(kappa="match") for _ in range(3))
    for rows in 2 * batches:
        whole(*rows)
    for rows in batches:
        first(*rows)
    second.load_state_dict(first.state_dict())
    for rows in batches:
        second(*rows)
    assert torch.equal(second.kappa, whole.kappa)


def test_evaluation_and_inference_leave_kappa_alone() -> None:
    loss = AdaDimLoss(kappa="match")
    loss.eval()(*views())  # the first call of a training compares the gradients
    loss.train()
    with torch.no_grad():
        loss(*views())
    assert (float(loss.kappa), int(loss.calls)) == (1.0, 0)
    loss(*views())
    assert float(loss.kappa) != 1.0


def test_gradients_that_overflow_once_leave_kappa_as_it_was() -> None:
    loss = AdaDimLoss(kappa="match")
    batches = [views() for _ in range(31)]
    for call, rows in enumerate(batches[:11]):
        if call == 10:
            before = loss.kappa.clone(), loss.gradient_norms.clone()
            rows = tuple((1e30 * x).detach().requires_grad_() for x in rows)
        loss(*rows)
    assert torch.equal(loss.kappa, before[0])
    assert torch.equal(loss.gradient_norms, before[1])
    for rows in batches[11:]:
        loss(*rows)
    assert torch.isfinite(loss.kappa)
    assert not torch.equal(loss.kappa, before[0])  # and it goes on from there


def test_gradients_that_overflow_at_first_leave_kappa_at_one() -> None:
    loss = AdaDimLoss(kappa="match")
    loss(*((1e30 * x).detach().requires_grad_() for x in views()))
    assert float(loss.kappa) == 1.0
    assert not loss.gradient_norms.any()


def test_kappa_is_no_path_for_the_gradient() -> None:
    rows = views()
    loss = AdaDimLoss(alpha=0.5, gamma=0, kappa="match")
    total = loss(*rows).total
    fixed = AdaDimLoss(alpha=0.5, gamma=0, kappa=float(loss.kappa))(*rows).total
    for ours, reference in zip(gradients(total, rows), gradients(fixed, rows), strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan])
def test_alpha_outside_the_unit_interval_is_an_error_that_changes_nothing(alpha: float) -> None:
    loss = AdaDimLoss(alpha=0.25)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
        loss.set_balance(alpha)
    assert float(loss.alpha) == 0.25
    with pytest.raises(ValueError, match="alpha"):
        AdaDimLoss(alpha=alpha)


def test_beta_is_gamma_times_the_phase_and_the_phase_is_alpha_by_default() -> None:
    loss = AdaDimLoss(alpha=0.5, gamma=0.4)
    assert float(loss.beta) == pytest.approx(0.2)
    loss.set_balance(0.75)
    assert float(loss.beta) == pytest.approx(0.3)
    loss.set_balance(0.75, phase=0.0)
    assert float(loss.beta) == 0.0
    assert float(loss.alpha) == 0.75
    with pytest.raises(ValueError, match="phase"):
        loss.set_balance(0.5, phase=math.inf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_gives_the_float32_loss(dtype: torch.dtype) -> None:
    rows = tuple(x.detach().to(dtype) for x in views())
    loss = AdaDimLoss(alpha=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = loss(*rows)
    assert output.total.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in output.parts.values())
    torch.testing.assert_close(output.total, loss(*(x.float() for x in rows)).total)


def test_input_that_does_not_fit_is_named() -> None:
    r1, r2, z1, z2 = views()
    loss = AdaDimLoss()
    with pytest.raises(ValueError, match=r"z1.*z2"):
        loss(r1, r2, z1, z2[:, :-1])
    with pytest.raises(ValueError, match=r"r1.*r2"):
        loss(r1, r2[:-1], z1, z2)
    with pytest.raises(ValueError, match="same number of rows, got 12 and 6"):
        loss(r1, r2, z1[:6], z2[:6])
    with pytest.raises(ValueError, match="at least 2 images"):
        loss(r1[:1], r2[:1], z1[:1], z2[:1])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"order": 0.0},
        {"order": -2.0},
        {"kappa": 0.0},
        {"kappa": -1.0},
        {"kappa": math.nan},
        {"kappa": "matched"},
        {"gamma": math.inf},
        {"information_floor": math.nan},
        {"decorrelation": "barlow"},
        {"redundancy_weight": -1.0},
    ],
    ids=str,
)
def test_a_setting_outside_its_range_is_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AdaDimLoss(**options)


def test_the_state_dict_carries_alpha_beta_and_kappa() -> None:
    old = AdaDimLoss(gamma=0.5, kappa="match")
    old.set_balance(0.3, phase=0.2)
    old(*views())
    new = AdaDimLoss(gamma=0.5, kappa="match")
    new.load_state_dict(old.state_dict())
    assert (float(new.alpha), float(new.beta), float(new.kappa)) == (
        float(old.alpha),
        float(old.beta),
        float(old.kappa),
    )
    rows = views()
    assert torch.equal(new(*rows).total, old(*rows).total)
    assert torch.equal(new.kappa, old.kappa)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.0, 1.0), (1.0, 0.0), (1.0, 0.5), (0.5, 0.0)])
def test_a_part_that_counts_nothing_takes_no_time_in_backward(alpha: float, gamma: float) -> None:
    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    def work(loss: Tensor) -> int:
        with Operations() as operations:
            torch.autograd.grad(loss, rows, retain_graph=True, allow_unused=True)
        return operations.count

    rows = views()
    lean, whole = AdaDimLoss(alpha=alpha, gamma=gamma, kappa=1), AdaDimLoss(alpha=0.5, gamma=1.0, kappa=1)
    whole.alpha.fill_(alpha)
    whole.beta.fill_(alpha * gamma)
    ours, theirs = lean(*rows), whole(*rows)
    assert work(ours.total) < 0.9 * work(theirs.total)
    assert ours.parts == theirs.parts
    for mine, reference in zip(gradients(ours.total, rows), gradients(theirs.total, rows), strict=True):
        torch.testing.assert_close(mine, reference)


def test_a_loss_goes_on_with_the_balance_of_a_state_dict() -> None:
    rows = views()
    halfway, loss = AdaDimLoss(alpha=0.5, gamma=1.0), AdaDimLoss(alpha=1.0, gamma=0.0)
    loss.load_state_dict(halfway.state_dict())
    for mine, reference in zip(
        gradients(loss(*rows).total, rows), gradients(halfway(*rows).total, rows), strict=True
    ):
        assert torch.equal(mine, reference)


def test_eps_reaches_the_variance_part() -> None:
    r, z = torch.randn(4, 8, 3), 0.1 * torch.randn(4, 8, 5)
    loss = AdaDimLoss(alpha=0.0, gamma=0.0, eps=0.5)(r[0], r[1], z[0], z[1]).total
    torch.testing.assert_close(loss, vicreg_loss(z[0], z[1], eps=0.5))
    assert not torch.isclose(loss, vicreg_loss(z[0], z[1]))


def test_matched_kappa_stays_within_its_limit_where_z_has_collapsed() -> None:
    """All rows of Z point one way, so that NT-Xent barely has a gradient; later it follows the norms again."""
    generator = torch.Generator().manual_seed(0)
    loss = AdaDimLoss(alpha=0.5, kappa="match")
    r = torch.randn(2, 32, 8, generator=generator)
    collapsed = 1e-3 * torch.randn(2, 32, 16, generator=generator) + torch.ones(16)
    for _ in range(3 * MATCH_EVERY):
        loss(*r, *collapsed.requires_grad_())
    assert float(loss.kappa) == 100.0
    assert float(loss.gradient_norms[0] / loss.gradient_norms[1]) > 100.0
    spread = torch.randn(2, 32, 16, generator=generator).requires_grad_()
    for _ in range(40 * MATCH_EVERY):
        loss(*r, *spread)
    assert float(loss.kappa) == pytest.approx(float(loss.gradient_norms[0] / loss.gradient_norms[1]))
    assert 0.1 < float(loss.kappa) < 100.0


def test_matching_survives_a_part_without_a_gradient() -> None:
    loss = AdaDimLoss(alpha=0.5, kappa="match")
    z = torch.randn(2, 4, 3, requires_grad=True)
    loss._match_gradients(z.square().sum(), 0.0 * z.sum(), [z])
    assert float(loss.kappa) == 100.0


def test_comparing_the_gradients_calls_no_hook_of_z() -> None:
    r1, r2, *leaves = views()
    calls: list[Tensor] = []
    loss = AdaDimLoss(alpha=0.5, kappa="match")
    for step in range(2):  # the comparison is in the first
        z = [2 * x for x in leaves]
        for x in z:
            x.retain_grad()
            x.register_hook(calls.append)
        total = loss(r1, r2, *z).total
        assert not calls
        assert all(x.grad is None for x in z)
        total.backward(retain_graph=True)
        assert len(calls) == 2
        retained = [x.grad.clone() for x in z]
        torch.testing.assert_close(retained, list(torch.autograd.grad(total, z)))
        calls.clear()
        assert int(loss.calls) == step + 1


@pytest.mark.parametrize("factor", [0.0, -3.0])
def test_a_hook_that_changes_the_gradient_of_z_does_not_change_kappa(factor: float) -> None:
    r1, r2, *leaves = views()
    hooked, plain = AdaDimLoss(), AdaDimLoss()
    z = [x.clone() for x in leaves]
    for x in z:
        x.register_hook(lambda gradient: factor * gradient)
    hooked(r1, r2, *z)
    plain(r1, r2, *leaves)
    assert torch.equal(hooked.kappa, plain.kappa)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = self.backbone(x)
        return r, self.head(r)


@pytest.mark.parametrize("one_pass", [False, True], ids=["a pass for each view", "one pass"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_under_fabric_the_default_objective_trains_as_in_plain_pytorch(precision: Any, one_pass: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(32, 64)
    batch = torch.cat([x, x + 0.1 * torch.randn(32, 64)])

    def train(
        net: nn.Module, optimizer: Any, backward: Callable[[Tensor], None], dtype: torch.dtype
    ) -> list[float]:
        loss, totals = AdaDimLoss(), []
        for _ in range(MATCH_EVERY + 2):  # with two comparisons
            if one_pass:
                r, z = net(batch.to(dtype))
                (r1, r2), (z1, z2) = r.chunk(2), z.chunk(2)
            else:
                (r1, z1), (r2, z2) = (net(part) for part in batch.to(dtype).chunk(2))
            total = loss(r1, r2, z1, z2).total
            optimizer.zero_grad()
            backward(total)
            optimizer.step()
            totals.append(float(total))
        return [*totals, float(loss.kappa)]

    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    net = Net().to(dtype)
    expected = train(net, torch.optim.SGD(net.parameters(), 1e-3), lambda total: total.backward(), dtype)

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    net = Net()
    ours = train(*fabric.setup(net, torch.optim.SGD(net.parameters(), 1e-3)), fabric.backward, torch.float32)
    exact = precision.endswith("true") and dtype != torch.bfloat16
    assert ours == pytest.approx(expected, rel=1e-5 if exact else 1e-2)
