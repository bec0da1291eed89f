"""Tests of losses.py: every equation against a slow loop written from the paper, and its edges.

    python -m pytest tests/test_losses.py        (from the root; a few seconds on a CPU)

A function that is added to losses.py fails until `inputs`, LITERAL and SIGNATURES have an entry for it.
"""

import ast
import copy
import inspect
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import losses

TREE = ast.parse(Path(losses.__file__).read_text(encoding="utf-8"))
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}
PUBLIC = [name for name in FUNCTIONS if not name.startswith("_")]

SIGNATURES = {
    "cross_entropy": "(logits, label, ignore_index=255)",
    "supervised_loss": "(logits, label, ignore_index=255)",
    "auxiliary_loss": "(aux_logits, logits, label, alphas, ignore_index=255)",
    "correctness": "(logits, label, ignore_index=255)",
    "weighted_cross_entropy": "(valid_logit, correct, reweight=True)",
    "eln_loss": "(valid_logits, predictions, label, reweight=True, ignore_index=255)",
    "labeled_loss": "(sup, aux, eln)",
    "ema_update": "(teacher, student, beta=0.995)",
    "pseudo_label_loss": "(logits, pseudo_label, valid)",
    "contrastive_loss": "(anchor, key, anchor_label, key_label, tau=0.5, ignore_index=255)",
    "unlabeled_loss": "(pseudo, contra)",
}
OPTIONS = {
    "weighted_cross_entropy": [{}, {"reweight": False}],
    "eln_loss": [{}, {"reweight": False}],
    "ema_update": [{}, {"beta": 0.5}],
    "contrastive_loss": [{}, {"tau": 0.01}],
}
CASES = [(name, options) for name in PUBLIC for options in OPTIONS.get(name, [{}])]
LOSSES = [case for case in CASES if case[0] not in ("correctness", "ema_update")]
# Eq. (7) and (11) add what the others return, which is never half precision.
PROMOTING = [case for case in LOSSES if case[0] not in ("labeled_loss", "unlabeled_loss")]
CONSTANT = {"auxiliary_loss": 1, "eln_loss": 1, "contrastive_loss": 1}  # the argument without a gradient

# ---- Arguments ----


def inputs(name, dtype=torch.float64):
    """Small arguments with void pixels. Every float asks for a gradient, also where none may arrive."""
    generator = torch.Generator().manual_seed(0)

    def real(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def network(steps):
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).to(dtype)
        for tensor in net.state_dict().values():
            tensor.copy_(real(*tensor.shape) if tensor.is_floating_point() else torch.tensor(steps))
        return net

    def main():  # sure, and right in image 0, wrong in image 1: Eq. (3) counts the first alone
        right = F.one_hot(label.clamp(max=2)).permute(0, 3, 1, 2)
        return torch.stack([6 * right[0], -6 * right[1]]).to(dtype).requires_grad_()

    image, pixels = (2, 3, 2, 3), (2, 2, 3)
    label = torch.tensor([[[0, 1, 2], [255, 1, 0]], [[2, 255, 255], [0, 0, 1]]])
    correct = torch.tensor([[[1, 0, 1], [255, 1, 0]], [[0, 255, 255], [1, 1, 1]]])
    pseudo_label = label.masked_fill(label == 255, 2)
    valid = torch.tensor([[[1, 1, 0], [0, 1, 1]], [[0, 0, 1], [0, 0, 0]]]).bool()
    anchor_label, key_label = torch.tensor([0, 1, 2, 255, 0, 3]), torch.tensor([0, 0, 1, 255, 2, 1, 2])
    return {
        "cross_entropy": lambda: [real(*image), label],
        "supervised_loss": lambda: [real(*image), label],
        "auxiliary_loss": lambda: [[real(*image), real(*image)], main(), label, [2, 3]],
        "correctness": lambda: [real(*image), label],
        "weighted_cross_entropy": lambda: [real(*pixels), correct],
        "eln_loss": lambda: [[real(*pixels) for _ in range(3)], [real(*image) for _ in range(3)], label],
        "labeled_loss": lambda: [real(), real(), real()],
        "ema_update": lambda: [network(3), network(8)],
        "pseudo_label_loss": lambda: [real(*image), pseudo_label, valid],
        "contrastive_loss": lambda: [real(6, 3), real(7, 3), anchor_label, key_label],
        "unlabeled_loss": lambda: [real(), real()],
    }[name]()


def mapped(change, x):
    """x with `change` applied to each of its tensors; lists are opened."""
    if isinstance(x, list):
        return [mapped(change, value) for value in x]
    return change(x) if isinstance(x, torch.Tensor) else x


def fresh(x, dtype):
    """New leaves with the same values in another dtype; integers stay."""
    return mapped(lambda t: t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t, x)


def leaves(x):
    """The tensors in x that ask for a gradient."""
    if isinstance(x, list):
        return [leaf for value in x for leaf in leaves(value)]
    return [x] if isinstance(x, torch.Tensor) and x.requires_grad else []


def trained(name, args):
    """The leaves that a gradient must reach: all but those of the constant argument."""
    return leaves([arg for i, arg in enumerate(args) if i != CONSTANT.get(name)])


def flat(network):
    return torch.cat([tensor.flatten().double() for tensor in network.state_dict().values()])


def call(function, args, options):
    """The function's result; of Eq. (8), which returns none, the teacher."""
    result = function(*args, **options)
    return flat(args[0]) if function.__name__ == "ema_update" else result


def assert_close(result, expected, tolerance):
    """Every number within `tolerance` of the largest: rounding is relative to what was added up."""
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


# ---- The equations as loops over Python floats ----


def literal_1(logits, label):
    def of_image(P, Y):
        terms = []
        for y, x in itertools.product(*map(range, Y.shape)):
            if Y[y, x] != 255:
                powers = [math.exp(score) for score in P[:, y, x].tolist()]
                terms.append(-math.log(powers[Y[y, x]] / sum(powers)))
        return sum(terms) / max(len(terms), 1)
    return [of_image(P, Y) for P, Y in zip(logits, label)]


def literal_3(aux_logits, logits, label, alphas):
    total = 0.0
    for X, L in enumerate(literal_1(logits, label)):
        for P_k, alpha in zip(aux_logits, alphas):
            L_k = literal_1(P_k, label)[X]
            total += L_k if L_k > alpha * L else 0
    return total / len(label)


def literal_4(logits, label):
    def of_pixel(scores, truth):
        return 255 if truth == 255 else int(scores.index(max(scores)) == truth)
    return [[[of_pixel(P[:, y, x].tolist(), truth) for x, truth in enumerate(row)]
             for y, row in enumerate(Y.tolist())]
            for P, Y in zip(logits, label)]


def literal_5(valid_logit, correct, reweight=True):
    def of_image(B, M):
        ones, zeros, total = M.count(1), M.count(0), 0.0
        for b, m in zip(B, M):
            probability = 1 / (1 + math.exp(-b))
            if m == 0:
                total -= (ones / zeros if reweight else 1) * math.log(1 - probability)
            if m == 1:
                total -= math.log(probability)
        return total / (ones + zeros)
    return [of_image(B.flatten().tolist(), M.flatten().tolist()) for B, M in zip(valid_logit, correct)]


def literal_6(valid_logits, predictions, label, reweight=True):
    terms = [sum(literal_5(B_k, torch.tensor(literal_4(P_k, label)), reweight))
             for B_k, P_k in zip(valid_logits, predictions)]
    return sum(terms) / (len(label) * len(predictions))


def literal_8(teacher, student, beta=0.995):
    old, new = flat(teacher).tolist(), flat(student).tolist()  # BatchNorm's count comes last
    return [beta * a + (1 - beta) * b for a, b in zip(old[:-1], new[:-1])] + old[-1:]


def literal_9(logits, pseudo_label, valid):
    total = 0.0
    for X, y, x in itertools.product(*map(range, valid.shape)):
        if valid[X, y, x]:
            powers = [math.exp(score) for score in logits[X, :, y, x].tolist()]
            total -= math.log(powers[pseudo_label[X, y, x]] / sum(powers))
    return total / valid.numel()


def literal_10(anchor, key, anchor_label, key_label, tau=0.5):
    def d(a, b):
        return math.exp(sum(x * y for x, y in zip(a, b)) / (math.hypot(*a) * math.hypot(*b)) / tau)
    V = [i for i, label in enumerate(anchor_label.tolist()) if label != 255]
    total = 0.0
    for i in V:
        f_i = anchor[i].tolist()
        pairs = [(d(f_i, f_j), label) for f_j, label in zip(key.tolist(), key_label.tolist())]
        positives = [value for value, label in pairs if label == anchor_label[i]]
        negatives = [value for value, label in pairs if label not in (anchor_label[i], 255)]
        total -= sum(math.log(p / (p + sum(negatives))) for p in positives) / max(len(positives), 1)
    return total / len(V)


LITERAL = {
    "cross_entropy": literal_1,
    "supervised_loss": lambda logits, label: sum(literal_1(logits, label)) / len(label),
    "auxiliary_loss": literal_3,
    "correctness": literal_4,
    "weighted_cross_entropy": literal_5,
    "eln_loss": literal_6,
    "labeled_loss": lambda sup, aux, eln: sup.item() + aux.item() + eln.item(),
    "ema_update": literal_8,
    "pseudo_label_loss": literal_9,
    "contrastive_loss": literal_10,
    "unlabeled_loss": lambda pseudo, contra: pseudo.item() + contra.item(),
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name, options", CASES)
def test_equals_the_equation_as_a_loop(name, options, dtype, tolerance):
    args = inputs(name, dtype)
    expected = torch.tensor(LITERAL[name](*args, **options), dtype=torch.float64)
    result = call(getattr(losses, name), args, options)
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    assert result.dtype == {"correctness": torch.int64, "ema_update": torch.float64}.get(name, dtype)


def slope(function, leaf, place, h):
    """The derivative of function() by one number of a leaf, from four values around it."""

    def moved(distance):
        before = leaf.data[place].clone()
        leaf.data[place] += distance
        value = function()
        leaf.data[place] = before
        return value

    return (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)


@pytest.mark.parametrize("name, options", LOSSES)
def test_gradient_is_that_of_the_loop(name, options):
    args, h = inputs(name), 2e-3 * options.get("tau", 0.5)

    def total(value, is_scalar):  # Eq. (1) and (5) give two images' values; the weights tell them apart
        return value if is_scalar else value[0] + 3 * value[1]

    def literal():
        value = LITERAL[name](*args, **options)
        return total(value, is_scalar=not isinstance(value, list))

    loss = getattr(losses, name)(*args, **options)
    total(loss, is_scalar=loss.ndim == 0).backward()
    for leaf in trained(name, args):
        places = itertools.product(*map(range, leaf.shape))
        expected = [slope(literal, leaf, place, h) for place in places]
        assert_close(leaf.grad.flatten(), torch.tensor(expected, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("name, options", [case for case in LOSSES if case[0] in CONSTANT])
def test_nothing_flows_into_constants(name, options):
    args = inputs(name)
    getattr(losses, name)(*args, **options).backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves(args[CONSTANT[name]]))
    assert all(leaf.grad.any() for leaf in trained(name, args))


# ---- Values that are known beforehand ----


def nl(probability):
    return -math.log(probability)


def scores(*images):
    """Logits (B, 2, 1, W) by which class 0 has these probabilities p; the loss of label 0 is -log p."""
    p = torch.tensor(images, dtype=torch.float64)
    return torch.stack([p, 1 - p], dim=1).log()[:, :, None].requires_grad_()


def belief(*images):
    """Outputs of ELN, (B, 1, W), whose sigmoid is this."""
    return torch.tensor(images, dtype=torch.float64)[:, None].logit().requires_grad_()


def rows(*images):
    return torch.tensor(images)[:, None]


def vectors(*values):
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 2).requires_grad_()


def labels(*values):
    return torch.tensor(values, dtype=torch.long)


# Arguments for two images, the values of each alone, and the value if a count, the indicator or the ratio
# (3 : 1 and 2 : 2) were taken over the batch.
CE = ([scores([.9] * 4, [.1] * 4), rows([0] * 4, [0, 255, 255, 255])],
      [nl(.9), nl(.1)], (4 * nl(.9) + nl(.1)) / 5)
BELIEF, RIGHT = belief([.9] * 4, [.6] * 4), rows([1, 1, 1, 0], [1, 1, 0, 0])
PREDICTION, LABEL = scores([.8, .8, .8, .2], [.8, .8, .2, .2]), rows([0] * 4, [0] * 4)
WCE = [(3 * nl(.9) + 3 * nl(.1)) / 4, (2 * nl(.6) + 2 * nl(.4)) / 4]
WCE_BATCH = (3 * nl(.9) + 5 / 3 * nl(.1) + 2 * nl(.6) + 5 / 3 * 2 * nl(.4)) / 8
UNEVEN = {
    "cross_entropy": CE,
    "supervised_loss": CE,
    "auxiliary_loss": ([[scores([.3], [.6])], scores([.9], [.7]), rows([0], [0]), [2]],
                       [nl(.3), 0], (nl(.3) + nl(.6)) / 2),
    "correctness": ([PREDICTION, LABEL], [.75, .5], None),
    "weighted_cross_entropy": ([BELIEF, RIGHT], WCE, WCE_BATCH),
    "eln_loss": ([[BELIEF], [PREDICTION], LABEL], WCE, WCE_BATCH),
    "pseudo_label_loss": ([CE[0][0], LABEL, CE[0][1] == 0], [nl(.9), nl(.1) / 4], CE[2]),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_an_image_does_not_depend_on_the_others(name):
    args, alone, per_batch = UNEVEN[name]
    function = getattr(losses, name)
    for image, expected in enumerate(alone):
        part = mapped(lambda t: t[image:image + 1], args)
        assert function(*part).double().mean().item() == pytest.approx(expected, abs=1e-9)
    batch = function(*args).double().mean().item()
    assert batch == pytest.approx(sum(alone) / 2, abs=1e-9)
    assert per_batch is None or abs(batch - per_batch) > 0.1  # the example tells the two apart


def test_each_prediction_has_its_own_ratio():
    """Two predictions of one image; a ratio over both would give WCE_BATCH."""
    loss = losses.eln_loss([BELIEF[:1], BELIEF[1:]], [PREDICTION[:1], PREDICTION[1:]], LABEL[:1])
    assert loss.item() == pytest.approx(sum(WCE) / 2, abs=1e-9)


def test_each_decoder_has_its_own_alpha():
    """-log .5 = .69, the others 2.3 to 2.5: they exceed 2 and 3 times as much, but not 4 times."""
    loss = losses.auxiliary_loss([scores([p]) for p in (.1, .09, .08)], scores([.5]), rows([0]), [2, 4, 3])
    assert loss.item() == pytest.approx(nl(.1) + nl(.08), abs=1e-9)


BIG = torch.ones(1, 512, 512, dtype=torch.long)
BIG[0, 7, 9] = 0
SURE, ONE_CLASS = vectors(1e4, -1e4).reshape(1, 2, 1, 1), vectors(3, 4).reshape(1, 1, 1, 2)
EAST, AXES = vectors(1, 0), vectors(1, 0, 0, 1)
SIDE = math.log(1 + math.exp(-2))  # EAST with AXES for a positive and a negative: -log(e^2 / (e^2 + 1))
DEGENERATE = {  # the value, then the arguments
    "supervised_loss": {
        "all void": (0, scores([.9, .1]), rows([255, 255])),
        "one pixel": (nl(.2), scores([.9, .2, .3]), rows([255, 0, 255])),
        "one void image": (nl(.2) / 2, scores([.9], [.2]), rows([255], [0])),
        "one class": (0, ONE_CLASS, rows([0, 0])),
        "sure and right": (0, SURE, rows([0])),
        "sure and wrong": (2e4, SURE, rows([1])),
    },
    "auxiliary_loss": {
        "all void": (0, [scores([.3])], scores([.9]), rows([255]), [2]),
        "one void image": (nl(.3) / 2, [scores([.3], [.3])], scores([.9], [.9]), rows([255], [0]), [2]),
        "equal": (0, [scores([.3, .6])], scores([.3, .6]), rows([0, 1]), [1]),
        "just above": (nl(.2999), [scores([.2999])], scores([.3]), rows([0]), [1]),
    },
    "weighted_cross_entropy": {
        "all void": (0, belief([.9, .1]), rows([255, 255])),
        "one pixel": (nl(.2), belief([.9, .2]), rows([255, 1])),
        "all right": ((nl(.9) + nl(.2)) / 2, belief([.9, .2]), rows([1, 1])),
        "all wrong": (0, belief([.9, .2]), rows([0, 0])),
        "one wrong": (262143 / 262144 * (nl(.9) + nl(.1)), belief([.9]).expand(1, 512, 512), BIG),
        "sure and wrong": (5e3, vectors(1e4, 1e4)[None, 0:1], rows([1, 0])),
    },
    "eln_loss": {
        "all void": (0, [belief([.9])], [scores([.8])], rows([255])),
        "all right": (nl(.9), [belief([.9])], [scores([.8])], rows([0])),
        "all wrong": (0, [belief([.9])], [scores([.8])], rows([1])),
        "one void image": (nl(.9) / 2, [belief([.9], [.9])], [scores([.8], [.8])], rows([255], [0])),
    },
    "pseudo_label_loss": {
        "none valid": (0, scores([.9, .1]), rows([0, 0]), rows([False, False])),
        "one pixel": (nl(.1) / 2, scores([.9, .1]), rows([0, 0]), rows([False, True])),
        "one image": (nl(.9) / 2, scores([.9], [.1]), rows([0], [0]), rows([True], [False])),
        "one class": (0, ONE_CLASS, rows([0, 0]), rows([True, True])),
    },
    "contrastive_loss": {
        "one anchor": (SIDE, EAST, AXES, labels(4), labels(4, 5)),
        "long feature": (SIDE, vectors(1e4, 0), AXES, labels(4), labels(4, 5)),
        "zero feature": (math.log(2), vectors(0, 0), AXES, labels(4), labels(4, 5)),
        "no anchor": (0, vectors(), AXES, labels(), labels(4, 5)),
        "no key": (0, EAST, vectors(), labels(4), labels()),
        "nothing valid": (0, EAST, AXES, labels(255), labels(255, 255)),
        "no valid anchor": (0, EAST, AXES, labels(255), labels(4, 5)),
        "no valid key": (0, EAST, AXES, labels(4), labels(255, 255)),
        "one class": (0, AXES, AXES, labels(4, 4), labels(4, 4)),
        "no positive": (0, EAST, AXES, labels(6), labels(4, 5)),
        "no positive for one": (SIDE / 2, vectors(1, 0, 1, 0), AXES, labels(6, 4), labels(4, 5)),
        # log(1 + e^200), which float32 cannot hold before the logarithm
        "small tau": (200, EAST, vectors(-1, 0, 1, 0), labels(4), labels(4, 5), .01),
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, case", [(name, case) for name in DEGENERATE for case in DEGENERATE[name]])
def test_degenerate_case_has_its_value_and_finite_gradients(name, case, dtype):
    expected, *args = DEGENERATE[name][case]
    args = fresh(args, dtype)
    with torch.autograd.set_detect_anomaly(True):  # refuses a NaN within the backward pass, too
        loss = getattr(losses, name)(*args)
        assert loss.requires_grad and loss.isfinite().all()
        assert loss.mean().item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        loss.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in trained(name, args))


def test_no_auxiliary_decoder_gives_0():
    loss = losses.auxiliary_loss([], *inputs("supervised_loss"), [])
    assert loss.shape == () and loss.item() == 0


@pytest.mark.parametrize("name", ["cross_entropy", "supervised_loss", "auxiliary_loss", "correctness",
                                  "weighted_cross_entropy", "eln_loss", "pseudo_label_loss"])
def test_volumes_have_one_more_axis(name):
    """Images with an axis of length 1 between the two others are volumes of the same pixels."""
    args = inputs(name)
    volumes = mapped(lambda t: t.unsqueeze(-2), args)
    expected, result = getattr(losses, name)(*args), getattr(losses, name)(*volumes)
    if name == "correctness":
        expected = expected.unsqueeze(-2)
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_a_refused_average_changes_nothing():
    teacher, student = inputs("ema_update")
    before = flat(teacher)
    student[1].running_var = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="shapes"):
        losses.ema_update(teacher, student)
    assert torch.equal(flat(teacher), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_student_of_another_precision_is_followed(dtype):
    teacher, student = (torch.nn.Linear(2, 2) for _ in range(2))
    student.to(dtype)
    wanted = 0.9 * flat(teacher) + 0.1 * flat(student)
    losses.ema_update(teacher, student, beta=0.9)
    torch.testing.assert_close(flat(teacher), wanted, rtol=1e-6, atol=1e-6)


def test_a_rejected_pixel_without_a_finite_score_counts_0():
    logits = scores([.9, .2]).detach()
    logits[..., 1] = math.nan
    loss = losses.pseudo_label_loss(logits, rows([0, 0]), rows([True, False]))
    assert loss.item() == pytest.approx(nl(.9) / 2)


# ---- Void and precision ----


@pytest.mark.parametrize("name", [name for name in SIGNATURES if "ignore_index" in SIGNATURES[name]])
def test_void_may_have_another_number(name):
    function, args = getattr(losses, name), inputs(name)
    expected, *args = mapped(lambda t: t if t.is_floating_point() else t.masked_fill(t == 255, -1),
                             [function(*args), *args])
    assert torch.equal(function(*args, ignore_index=-1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name, options", PROMOTING)
def test_half_precision_is_promoted(name, options, dtype, autocast):
    """Half precision and autocast may change nothing but the rounding of the inputs and their gradients."""
    function, args = getattr(losses, name), inputs(name, dtype)
    exact = fresh(args, torch.float32)
    expected = function(*exact, **options)
    expected.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = function(*args, **options)
    result.sum().backward()
    assert result.dtype == torch.float32
    assert_close(result, expected, 1e-5)
    for leaf, twin in zip(trained(name, args), trained(name, exact)):
        assert_close(leaf.grad.float(), twin.grad, max(1e-5, torch.finfo(dtype).eps))


# ---- Eq. (10) and Eq. (8) ----


def contrast(anchors=slice(None), keys=slice(None), **options):
    """Eq. (10) for these anchors and keys in this order: its value, and the gradient of every anchor."""
    anchor, key, label, key_label = inputs("contrastive_loss")
    loss = losses.contrastive_loss(anchor[anchors], key[keys], label[anchors], key_label[keys], **options)
    loss.backward()
    return torch.cat([loss.detach()[None], anchor.grad.flatten()])


@pytest.mark.parametrize("options", [
    {"anchors": [5, 3, 1, 0, 4, 2]}, {"keys": [6, 2, 0, 5, 3, 1, 4]},
    {"anchors": [2, 5, 0, 4, 3, 1], "keys": [3, 4, 1, 6, 0, 2, 5]},
    {"anchors": [0, 1, 2, 4, 5]}, {"keys": [0, 1, 2, 4, 5, 6]},  # all but the void ones
])
def test_contrast_depends_neither_on_order_nor_on_void(options):
    assert_close(contrast(**options), contrast(), 1e-12)


def test_parts_of_the_anchors_add_up_to_all_of_them():
    """Eq. (10) is a mean over anchors given all keys: how processes and parts of a batch share it."""
    anchor, key, label, key_label = inputs("contrastive_loss")
    total, V = 0, (label != 255).sum()
    for part in ([0, 3], [1], [5, 2, 4]):
        mean = losses.contrastive_loss(anchor[part], key, label[part], key_label)
        total = total + mean * (label[part] != 255).sum() / V
    total.backward()
    assert_close(torch.cat([total.detach()[None], anchor.grad.flatten()]), contrast(), 1e-12)


def test_ema_of_three_steps_in_place():
    teacher, student = inputs("ema_update")
    start, thetas = copy.deepcopy(teacher.state_dict()), []
    before = [(t, t.data_ptr(), t.requires_grad) for t in [*teacher.parameters(), *teacher.buffers()]]
    for step in range(3):
        for tensor in student.state_dict().values():
            tensor.add_(step + 1)
        thetas.append(copy.deepcopy(student.state_dict()))
        losses.ema_update(teacher, student, beta=0.9)
        assert all(torch.equal(tensor, thetas[-1][name]) for name, tensor in student.state_dict().items())
    for name, average in teacher.state_dict().items():
        first, second, third = [theta[name] for theta in thetas]
        closed_form = 0.729 * start[name] + 0.1 * (0.81 * first + 0.9 * second + third)
        expected = start[name] if name.endswith("num_batches_tracked") else closed_form
        torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)
    after = [*teacher.parameters(), *teacher.buffers()]
    for tensor, (old, address, requires_grad) in zip(after, before):
        assert tensor is old and tensor.data_ptr() == address
        assert tensor.is_leaf and tensor.requires_grad == requires_grad


# ---- Wrong arguments ----


@pytest.mark.parametrize("error, name, args", [
    (ValueError, "auxiliary_loss", [[scores([.3])], scores([.9]), rows([0]), [2, 3]]),
    (ValueError, "eln_loss", [[belief([.9])], [scores([.8]), scores([.8])], rows([0])]),
    (RuntimeError, "eln_loss", [[], [], rows([0])]),
    (ValueError, "correctness", [scores([.9]), rows([0]), 0]),
    (ValueError, "correctness", [scores([.9]), rows([0]), 1]),
    (ValueError, "ema_update", [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3, affine=False)]),
    (ValueError, "ema_update", [torch.nn.BatchNorm1d(3, affine=False), torch.nn.BatchNorm1d(3)]),
    (ValueError, "ema_update", [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3, track_running_stats=False)]),
    (ValueError, "ema_update", [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(2)]),
    (ValueError, "ema_update", [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(1)]),  # would be broadcast
    (ValueError, "ema_update", [torch.nn.BatchNorm1d(3).bfloat16(), torch.nn.BatchNorm1d(3)]),
    (ValueError, "ema_update", [torch.nn.BatchNorm1d(3).half(), torch.nn.BatchNorm1d(3).half()]),
    (IndexError, "cross_entropy", [scores([.9]), rows([2])]),
    (IndexError, "pseudo_label_loss", [scores([.9]), rows([255]), rows([True])]),
    (ValueError, "pseudo_label_loss", [scores([.9]), rows([0]), rows([1])]),
    (ValueError, "pseudo_label_loss", [scores([.9]), rows([0]), rows([.7])]),
    (ValueError, "pseudo_label_loss", [scores([.9, .9]), rows([0, 0]), rows([True, True, True])]),
    (ValueError, "pseudo_label_loss", [scores([.9, .9]), rows([0, 0]), rows([True, True])[:, None]]),
    (ValueError, "contrastive_loss", [EAST, AXES, labels(-1), labels(4, 5)]),
    (ValueError, "contrastive_loss", [EAST, AXES, labels(4), labels(4, -100)]),
    (ValueError, "contrastive_loss", [EAST, AXES, labels(4, 5), labels(4, 5)]),
    (ValueError, "contrastive_loss", [EAST, AXES, labels(4), labels(4)]),
    (ValueError, "contrastive_loss", [EAST[:, :, None], AXES, labels(4), labels(4, 5)]),
    (ValueError, "contrastive_loss", [EAST, AXES[None], labels(4), labels(4, 5)]),
])
def test_wrong_arguments_are_refused(error, name, args):
    with pytest.raises(error):
        getattr(losses, name)(*args)


# ---- Copying a loss alone ----


@pytest.mark.parametrize("name, options", CASES)
def test_runs_when_copied_with_what_its_docstring_calls(name, options):
    called = re.search(r"Calls:\s*(\w+(?:,\s*\w+)*)", ast.get_docstring(FUNCTIONS[name]))
    names = (re.split(r",\s*", called[1]) if called else []) + [name]
    namespace = {"torch": torch, "F": F}
    exec(compile(ast.Module([FUNCTIONS[n] for n in names], []), "pasted", "exec"), namespace)
    expected = call(getattr(losses, name), inputs(name), options)
    assert torch.equal(call(namespace[name], inputs(name), options), expected)


def test_public_functions_and_their_signatures():
    assert {name: str(inspect.signature(getattr(losses, name))) for name in PUBLIC} == SIGNATURES


def test_module_imports_torch_alone_and_keeps_no_state():
    nodes = list(ast.walk(TREE))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {module.split(".")[0] for module in modules} == {"torch"}
    assert ast.get_docstring(TREE)
    assert all(isinstance(node, (ast.Import, ast.FunctionDef)) for node in TREE.body[1:])


def test_the_readmes_example_of_copying_a_loss_runs():
    text = (Path(losses.__file__).parent / "README.md").read_text(encoding="utf-8")
    block = next(part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "paste" in part)
    imports, rest = block.split("\n", 1)
    namespace = {}
    exec(imports, namespace)
    exec(compile(ast.Module([FUNCTIONS["contrastive_loss"]], []), "pasted", "exec"), namespace)
    exec(rest, namespace)
    assert namespace["f"].grad.any()
