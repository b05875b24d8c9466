"What every registered loss must do: finite gradients, weights as repeated rows, mixing, a way back to the class shares."
import numpy as np
import pytest
import torch
from torch import nn

from fastsmile.config.choices import LOSSES
from fastsmile.config.fit import FitConfig
from fastsmile.core.errors import OptionError
from fastsmile.metrics.calibration import loss_link, prior_shift, probabilities_from_logits
from fastsmile.reports.card import probability_note
from fastsmile.training.balance import plan_balance
from fastsmile.training.losses import BATCH_LOSSES, ROW_LOSSES, RowLoss, make_loss

LABELS = np.repeat([0, 1, 2], [60, 30, 10])
PER_ROW = [word for word, loss in LOSSES.items() if loss.per_row]


def made(word: str, balance: str = 'none') -> nn.Module:
    loss = LOSSES[word]
    return make_loss(word, loss.value and loss.value.default, plan_balance(LABELS, 3, balance, seed=1))


def test_each_loss_has_one_entry_and_one_function():
    assert set(ROW_LOSSES) == set(PER_ROW) and set(ROW_LOSSES) | set(BATCH_LOSSES) == set(LOSSES) and not set(ROW_LOSSES) & set(BATCH_LOSSES)


@pytest.mark.parametrize('word', LOSSES)
@pytest.mark.parametrize('size', [0., 1., 80.])
def test_the_gradient_is_finite_and_learns(word, size):
    torch.manual_seed(0)
    z, y = (size * torch.randn(64, 3)).requires_grad_(), torch.randint(0, 3, (64,))
    loss = made(word)
    value = loss(z, y)
    value.backward()
    assert value.shape == () and torch.isfinite(value) and torch.isfinite(z.grad).all() and z.grad.any()
    with torch.no_grad():
        assert loss(z, y).item() >= loss(80. * nn.functional.one_hot(y, 3), y).item() - 1e-6 or LOSSES[word].link == 'label-smoothing'
        assert loss(z.bfloat16(), y).dtype == torch.float32


@pytest.mark.parametrize('word', LOSSES)
def test_fastai_can_show_what_it_predicts(word):
    z, loss = torch.tensor([[2., 1., 0.], [0., 1., 3.]]), made(word)
    shown = loss.activation(z)
    assert ((shown > 0) & (shown < 1)).all() and loss.decodes(z).tolist() == [0, 2]
    assert torch.allclose(shown.sum(1), torch.ones(2)) == (LOSSES[word].link != 'sigmoid')


@pytest.mark.parametrize('word', PER_ROW)
def test_a_weight_is_a_row_that_often(word):
    torch.manual_seed(0)
    z, y, weights = torch.randn(30, 3), torch.randint(0, 3, (30,)), np.array([1., 2., 3.])
    value = LOSSES[word].value and LOSSES[word].value.default
    plain, weighted = RowLoss(word, value, np.ones(3), np.zeros(3)), RowLoss(word, value, weights, np.zeros(3))
    plain.reduction = weighted.reduction = 'sum'
    often = torch.from_numpy(weights).long()[y]
    assert torch.allclose(weighted(z, y), plain(z.repeat_interleave(often, 0), y.repeat_interleave(often)))


@pytest.mark.parametrize('word', LOSSES)
def test_what_goes_with_a_loss_is_what_its_entry_says(word):
    loss = LOSSES[word]
    for options, accepted in ((dict(augment='light+mixup'), loss.per_row), (dict(balance='class-weight'), loss.per_row),
                              (dict(balance='logit-adjust'), loss.per_row and not loss.no_logit_adjust)):
        if accepted: FitConfig(loss=word, **options)
        else:
            with pytest.raises(OptionError) as e: FitConfig(loss=word, **options)
            assert f'--loss {word} with' in e.value.message
    assert probability_note('none', word, 'data').endswith(loss.note or '.')
    if loss.per_row:  # fastai's MixUp asks for the loss of each row
        per_row = made(word)
        per_row.y_int, per_row.reduction = True, 'none'
        assert per_row(torch.randn(5, 3), torch.zeros(5, dtype=torch.long)).shape == (5,)


@pytest.mark.parametrize('balance', ['none', 'class-weight'])
@pytest.mark.parametrize('word', PER_ROW)
def test_its_minimum_leads_back_to_the_class_shares(word, balance):
    "Logits alone, on rows of known shares: what they are at the minimum, taken back, is these shares"
    plan, value = plan_balance(LABELS, 3, balance, seed=1), LOSSES[word].value and LOSSES[word].value.default
    loss, z, y = make_loss(word, value, plan).double(), torch.zeros(1, 3, dtype=torch.double, requires_grad=True), torch.from_numpy(LABELS)
    opt = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn='strong_wolfe')

    def step():
        opt.zero_grad()
        v = loss(z.expand(len(y), 3), y)
        v.backward()
        return v
    opt.step(step)
    share = np.array([.6, .3, .1])
    back = probabilities_from_logits(z.detach().numpy(), prior_shift(share, plan.implied_prior), loss_link(word, value))
    assert np.allclose(back[0], share, atol=5e-3)
