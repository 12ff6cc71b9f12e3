"""The model on a CUDA device says and learns what it says and learns on the CPU.

make test ARGS=tests/gpu
"""

from __future__ import annotations

import pytest
import torch
from helpers.device import NEEDS_GPU

from hcmen.base.modalities import MODALITIES, VARIANTS
from hcmen.models.hcmen.model import HCMEN
from hcmen.training.presets import PRESETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NEEDS_GPU),
]


@pytest.fixture
def case():
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    config = PRESETS["tiny"].model
    features = {m: torch.randn(7, config.modality(m).max_steps, config.modality(m).features) for m in MODALITIES}
    lengths = {m: torch.randint(1, config.modality(m).max_steps + 1, (7,)) for m in MODALITIES}
    present = torch.tensor([v.mask for v in VARIANTS])
    return HCMEN(config).eval(), features, lengths, present


def test_score_and_gradients_agree_with_the_cpu(case):
    model, features, lengths, present = case
    expected = model(features, lengths, present)
    expected.score.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    model.cuda()
    got = model({m: x.cuda() for m, x in features.items()}, {m: x.cuda() for m, x in lengths.items()}, present.cuda())
    torch.testing.assert_close(got.score.cpu(), expected.score.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.modality_weights.cpu(), expected.modality_weights.detach(), atol=1e-5, rtol=1e-4)
    got.score.square().sum().backward()
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad.cpu(), gradients[name], atol=1e-3 * scale + 1e-6, rtol=1e-3)


def test_a_training_step_lowers_the_loss(case):
    model, features, lengths, present = case
    model.cuda().train()
    features, lengths = ({m: x.cuda() for m, x in d.items()} for d in (features, lengths))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    target = torch.linspace(-2, 2, 7, device="cuda")
    losses = []
    for _ in range(20):
        loss = (model(features, lengths, present.cuda()).score - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
