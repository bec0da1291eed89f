"""Tests of evaluate.py: every measure against a literal loop over pixels; what is read, drawn, written, said.

    python -m pytest tests/test_evaluate.py        (from the root; a few seconds on a CPU)

Networks are stand-ins that give known logits, but where saved networks are read again.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import math
import os
import pickle
import runpy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw
from torch import nn

import data
import evaluate
from data import InputError, Process, SegmentationData, load_dataset, normalize, resize, voc_palette
from eln import AuxiliaryNetworks, eln_input
from model import DeepLabV3Plus
from small_networks import small_resnet

C, PALETTE = 3, [[10, 20, 30], [200, 0, 0], [0, 150, 90]]
SHAPES = load_dataset("shapes")
N = len(SHAPES.classes)
SCORED = [key for key in SHAPES.val[:20] if N - 1 not in SHAPES.read_pair(key)[1]][:2]  # no last class
ARGS = argparse.Namespace(
    dataset="shapes", data="", size=[32, 32], corrector="eln", eln_backbone="resnet18", eln_weights="none",
    width=8, alphas=[], pretrain_iters=4, eln_iters=3, iters=9, split=0, seed=0, lr=0.25,
)


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    with mock.patch.object(torchvision.models, "get_model", small_resnet):
        yield


def labels(seed, H, W):
    """A random mask (H, W) uint8 of C classes and void."""
    return np.random.default_rng(seed).choice(np.uint8([*range(C), 255]), (H, W))


def logits_of(value, h, w):
    """The stand-in's logits (C, h, w) for an image of this grey value."""
    return torch.randn(C, h, w, generator=torch.Generator().manual_seed(value))


class Stub(nn.Module):
    """A segmentation network that recognises images of one grey value, and lists which it saw."""

    seen = ()

    def forward(self, X, embed=False):
        assert not self.training
        value = round(float(X[0, 0, 0, 0]) * 0.229 * 255 + 0.485 * 255)  # ImageNet's mean and deviation
        self.seen += (value,)
        return logits_of(value, *X.shape[2:])[None], None


def bilinear(logits, *size):
    """(C, h, w) -> (C, H, W), between pixel centres, edges repeated."""
    array = logits.numpy()
    for axis, n in enumerate(size, start=1):
        places = (np.arange(n) + 0.5) * array.shape[axis] / n - 0.5
        known = np.arange(array.shape[axis])
        array = np.apply_along_axis(lambda line: np.interp(places, known, line), axis, array)
    return torch.from_numpy(array)


def softmax(scores):
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


# ---- Validation ----


def confusion(prediction, label):
    matrix = torch.zeros(C, C).long()
    for row, truth in zip(prediction, label):
        for p, y in zip(row, truth):
            if y != 255:
                matrix[y, p] += 1
    return matrix


def test_iou_is_intersection_over_union_of_the_classes_that_occur():
    # class 0: 3 right of a union of 6; class 1: there but never found; class 2: absent; class 3: 4 of 7
    matrix = torch.tensor([[3, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 4]])
    wanted = [300 / 6, 0.0, math.nan, 400 / 7]
    assert evaluate.iou(matrix).tolist() == pytest.approx(wanted, nan_ok=True)
    assert evaluate.mean_iou(matrix) == pytest.approx((300 / 6 + 0 + 400 / 7) / 3)
    only_predicted = torch.tensor([[5, 5], [0, 0]])  # a class that is predicted but not there counts 0
    assert evaluate.iou(only_predicted).tolist() == [50, 0]
    with pytest.raises(InputError, match="nothing to score"):
        evaluate.mean_iou(torch.zeros(3, 3))


@pytest.mark.parametrize("crop", [False, True])
def test_score_counts_each_image_once_at_both_resolutions(tmp_path, monkeypatch, crop):
    size, files, shapes = (12, 10), {}, [(20, 15), (12, 10), (9, 14), (24, 20), (7, 7)]
    want = {"resized": torch.zeros(C, C).long(), "original": torch.zeros(C, C).long()}
    for i, (H, W) in enumerate(shapes):
        value, label = 40 * i + 17, labels(i, H, W)
        Image.fromarray(np.full((H, W), value, np.uint8)).save(tmp_path / f"{i}.png")
        Image.fromarray(label).save(tmp_path / f"{i}_mask.png")
        files[f"{i}"] = (tmp_path / f"{i}.png", tmp_path / f"{i}_mask.png")
        h, w = (H, W) if crop else size
        logits = logits_of(value, h, w)
        rows = [label[int((y + 0.5) * H / h)] for y in range(h)]
        nearest = [[row[int((x + 0.5) * W / w)] for x in range(w)] for row in rows]
        want["resized"] += confusion(logits.argmax(0).tolist(), nearest)
        want["original"] += confusion(bilinear(logits, H, W).argmax(0).tolist(), label.tolist())
    dataset = SegmentationData("folder", files, [], list(files), list("abc"), voc_palette(), crop)
    assert crop == torch.equal(want["resized"], want["original"])

    monkeypatch.setattr(torch.distributed, "all_reduce", add_up := mock.Mock())  # the test does it itself
    for world in (1, 2, 3):
        network = Stub().train()
        parts = [evaluate.score(network, dataset, size, Process(rank, world)) for rank in range(world)]
        for name in want:
            assert torch.equal(sum(part[name] for part in parts), want[name])
        assert sorted(network.seen) == [17, 57, 97, 137, 177]
        assert network.training  # as before
    assert add_up.call_count == 2 * (2 + 3)  # both matrices in each process

    network, args = Stub().eval(), argparse.Namespace(size=size, workers=0)
    monkeypatch.setattr(evaluate, "resized_argmax", None)  # training does without the images' own size
    mIoU = evaluate.validate(network, dataset, args, Process())
    assert mIoU == evaluate.mean_iou(want["resized"]) and not network.training


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("number", [1, 8, 9, 100, 255])
def test_resized_argmax_is_that_of_all_classes_but_holds_a_few(monkeypatch, number, layout):
    generator = torch.Generator().manual_seed(number)
    logits = torch.randn(1, number, 6, 7, generator=generator)
    logits[..., 3:] = logits[..., 3:].round()  # several classes have the largest value
    logits = logits.contiguous(memory_format=layout)
    resize_bilinear, held = evaluate.resize_bilinear, []

    def spy(part, size):
        held.append(part.shape[1])
        return resize_bilinear(part, size)

    monkeypatch.setattr(evaluate, "resize_bilinear", spy)
    for size in ((6, 7), (33, 20), (3, 4)):
        index = evaluate.resized_argmax(logits, size)
        assert index.dtype == torch.uint8
        assert torch.equal(index.long(), resize_bilinear(logits, size)[0].argmax(0))
    assert max(held) <= 8


# ---- Error localization ----


def literal_average_precision(scores, wrong):
    """From the definition: over distinct thresholds from high to low, precision times the gain in recall."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        claimed = [w for s, w in zip(scores, wrong) if s >= threshold]
        total += sum(claimed) / len(claimed) * (sum(claimed) / sum(wrong) - recall)
        recall = sum(claimed) / sum(wrong)
    return total


def literal_rates(positive, claimed):
    """Precision, recall and F1 of pixels that are positive, and that are claimed to be; nan for 0 / 0."""
    hits = sum(p and c for p, c in zip(positive, claimed))
    precision = hits / sum(claimed) if any(claimed) else math.nan
    recall = hits / sum(positive) if any(positive) else math.nan
    both = sum(claimed) + sum(positive)
    return [precision, recall, 2 * hits / both if both else math.nan]


def literal_judgement(P, B, correction, threshold):
    """One pixel's (error score, whether it is rejected) by each method.

    P           its probabilities in the network's prediction
    B           ELN's logit; beyond 30 its doubts are not told apart
    correction  its probabilities in the s-ECN's output
    """
    c = P.index(max(P))
    best_other = max(correction[:c] + correction[c + 1 :])
    return {
        "ELN": (-min(max(B, -30), 30), B <= 0),
        "s-ECN": (math.log(best_other / correction[c]), best_other >= correction[c]),
        "confidence": (-max(P), max(P) <= threshold),
        "none": (0.0, False),
    }


def test_precision_recall_f1_of_counted_pixels():
    # [wrong, rejected] pixels of images: ordinary, without an error, without a rejection, without both, void
    counts = [[[5, 1], [2, 4]], [[3, 2], [0, 0]], [[3, 0], [2, 0]], [[7, 0], [0, 0]], [[0, 0], [0, 0]]]
    matrices = torch.tensor(counts).double()
    errors = evaluate.precision_recall_f1(matrices, positive=1)
    correct = evaluate.precision_recall_f1(matrices, positive=0)
    assert errors[0].tolist() == pytest.approx([4 / 5, 4 / 6, 8 / 11])
    assert correct[0].tolist() == pytest.approx([5 / 7, 5 / 6, 10 / 13])
    for matrix, of_errors, of_correct in zip(counts, errors.tolist(), correct.tolist()):
        pixels = [pair for pair in np.ndindex(2, 2) for _ in range(matrix[pair[0]][pair[1]])]
        wrong, rejected = [pair[0] for pair in pixels], [pair[1] for pair in pixels]
        assert of_errors == pytest.approx(literal_rates(wrong, rejected), nan_ok=True)
        right, accepted = [1 - w for w in wrong], [1 - r for r in rejected]
        assert of_correct == pytest.approx(literal_rates(right, accepted), nan_ok=True)


@pytest.mark.parametrize("scores, wrong, want", [
    ([4, 3, 2, 1], [1, 0, 1, 0], 1 / 2 + 2 / 3 * 1 / 2),
    ([4, 3, 2, 1], [1, 1, 0, 0], 1),
    ([1, 2, 3, 4], [1, 0, 0, 0], 1 / 4),
    ([2, 2, 2, 2], [0, 1, 0, 0], 1 / 4),  # tied
    ([90, 40, 2, -99], [0, 1, 0, 0], 1 / 2),  # beyond 30 they are tied, too
    ([4, 3], [0, 0], 0),
    ([], [], 0),
])
def test_average_precision_of_known_rankings(scores, wrong, want):
    histogram = evaluate.error_histogram(torch.tensor(scores).float(), torch.tensor(wrong).bool())
    assert histogram.sum(1).tolist() == [len(wrong) - sum(wrong), sum(wrong)]
    assert evaluate.average_precision(histogram) == pytest.approx(want)


def test_average_precision_is_that_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-25, 25, (300,), generator=generator)  # with ties
    wrong = 10 * torch.randn(300, generator=generator) < scores
    want = literal_average_precision(scores.tolist(), wrong.tolist())
    parts = [evaluate.error_histogram(scores[part], wrong[part]) for part in (slice(100), slice(100, 300))]
    assert evaluate.average_precision(sum(parts)) == pytest.approx(want) and 0.5 < want < 0.95


@pytest.mark.parametrize("judge", ["ELN", "s-ECN", None])
def test_error_localization_is_precision_recall_f1_of_both_classes(judge):
    # images: 0 ordinary; 1 few errors; 2 none; 3 all void; 4 ELN rejects nothing, and what is unsure is wrong
    H, W, threshold = 6, 7, 0.6
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(5, C, H, W, generator=generator)
    order = torch.randperm(5 * H * W, generator=generator)
    valid = torch.linspace(-20, 20, 5 * H * W)[order].reshape(5, H, W)
    valid[4] = valid[4].abs() + 1
    valid[0, :2] *= 4  # beyond 30
    correction = 3 * torch.randn(5, C, H, W, generator=generator)
    truth = torch.stack([torch.from_numpy(labels(i, H, W)).long() for i in range(5)])
    prediction, (first, second) = logits.argmax(1), logits[4].topk(2, dim=0).values
    truth[1, 1:], truth[2], truth[3] = prediction[1, 1:], prediction[2], 255
    truth[4] = (prediction[4] + (first - second < 12)) % C
    images = [(torch.full((1, 3, H, W), float(i)), truth[i], truth[i]) for i in range(5)]

    def eln(x):
        i = int(x[0, 0, 0, 0])
        assert torch.equal(x, eln_input(images[i][0], logits[i][None]))
        return (valid if judge == "ELN" else correction)[i][None]

    network = mock.Mock(side_effect=lambda X: (logits[int(X[0, 0, 0, 0])][None], None))
    table = evaluate.error_localization(network, eln if judge else None, images, threshold)

    methods = [judge] * bool(judge) + ["confidence", "none"]
    wrong = [[] for _ in range(5)]  # of each image's pixels
    rejected = {method: [[] for _ in range(5)] for method in methods}
    scores = {method: [] for method in methods}  # of all images' pixels
    for i, y, x in np.ndindex(5, H, W):
        if truth[i, y, x] == 255:
            continue
        P = softmax(logits[i, :, y, x].tolist())
        other = softmax(correction[i, :, y, x].tolist())
        wrong[i].append(P.index(max(P)) != int(truth[i, y, x]))
        judged = literal_judgement(P, float(valid[i, y, x]), other, threshold)
        for method in methods:
            scores[method].append(judged[method][0])
            rejected[method][i].append(judged[method][1])

    assert len(table) == 5 * len(methods)
    for method in methods:
        exact = literal_average_precision(scores[method], sum(wrong, []))
        # scores are counted in bins, so that the softmax's near neighbours may tie
        assert table[method, "error", "AP"] == [pytest.approx(exact, abs=1e-6 if method == "ELN" else 3e-3)]
        for name, is_error in (("correct", False), ("error", True)):
            positive = [[w == is_error for w in image] for image in wrong]
            claimed = [[r == is_error for r in image] for image in rejected[method]]
            each = [literal_rates(*image) for image in zip(positive, claimed)]
            mean = torch.tensor(each).double().nanmean(0).tolist()
            pooled = literal_rates(sum(positive, []), sum(claimed, []))
            assert table[method, name, "image"] == pytest.approx(mean, abs=1e-6, nan_ok=True)
            assert table[method, name, "pooled"] == pytest.approx(pooled, nan_ok=True)


class Summing:
    """A process whose sums are those of all calls up to then, as if each were of another process."""

    def __init__(self):
        self.total = 0

    def sum(self, tensor):
        self.total = self.total + tensor
        return self.total


@pytest.mark.parametrize("corrector", ["ELN", "s-ECN"])
def test_diagnosis_is_of_the_whole_batch(corrector):
    B, K, H, W = 3, 2, 4, 5
    generator = torch.Generator().manual_seed(0)
    label = torch.stack([torch.from_numpy(labels(i, H, W)).long() for i in range(B)])
    predictions = torch.randn(K + 1, B, C, H, W, generator=generator)
    is_class = torch.stack([label == c for c in range(C)], dim=1)
    predictions[0] += 5 * is_class  # the main decoder is right almost everywhere
    valid = torch.randn(K + 1, B, H, W, generator=generator)
    correction = torch.randn(K + 1, B, C, H, W, generator=generator)
    outputs = valid if corrector == "ELN" else correction

    ce, wrong = [0.0] * (K + 1), [[] for _ in range(K + 1)]  # of each decoder
    rejected = [[] for _ in range(K + 1)]
    for k, i in itertools.product(range(K + 1), range(B)):
        terms = []
        for y, x in np.ndindex(H, W):
            truth = int(label[i, y, x])
            if truth == 255:
                continue
            P = softmax(predictions[k, i, :, y, x].tolist())
            other = softmax(correction[k, i, :, y, x].tolist())
            terms.append(-math.log(P[truth]))
            wrong[k].append(P.index(max(P)) != truth)
            judged = literal_judgement(P, float(valid[k, i, y, x]), other, threshold=0)
            rejected[k].append(judged[corrector][1])
        ce[k] += sum(terms) / len(terms) / B
    want = {f"ce_{k}_over_ce_0": ce[k] / ce[0] for k in (1, 2)}
    want.update({f"wrong_{k}": sum(wrong[k]) / len(wrong[k]) for k in range(K + 1)})
    want["eln_precision"], want["eln_recall"], _ = literal_rates(sum(wrong, []), sum(rejected, []))

    process = Summing()
    for part in (slice(0, 1), slice(1, 3)):  # the images of two processes
        logits, *aux_logits = predictions[:, part]
        row = evaluate.diagnosis(logits, aux_logits, list(outputs[:, part]), label[part], process)
    assert row == pytest.approx(want, rel=1e-6) and list(row) == list(want)
    void = torch.full_like(label, 255)
    row = evaluate.diagnosis(predictions[0], [predictions[1]], list(outputs[:2]), void, Process())
    assert set(row.values()) == {0}


# ---- Figures ----


@pytest.mark.parametrize("judge, before", [("ELN", False), ("s-ECN", True), (None, False), (None, True)])
def test_panels_are_those_of_fig5_and_rejected_pixels_white(judge, before):
    H, W = 12, 48
    X, image = normalize(torch.full((1, 3, H, W), 90, dtype=torch.uint8)), torch.randint(0, 256, (3, H, W))
    label, output = torch.from_numpy(labels(3, H, W)).long(), torch.randn(*[C] * (judge == "s-ECN"), H, W)
    networks = {name: Stub().eval() for name in ["stage 1"] * before + ["stage 2"]}
    eln = (lambda x: output[None]) if judge else None
    shown = evaluate.panels(networks, eln, X, image.byte(), label, PALETTE)

    P, Y = logits_of(90, H, W).argmax(0).numpy(), label.numpy()
    rejected = output.argmax(0).numpy() != P if judge == "s-ECN" else output.numpy() <= 0
    colours = np.array(PALETTE + [[255] * 3] * 253)
    light_grey, magenta, white = [210] * 3, [255, 0, 255], [255] * 3

    def marked(mask):
        return np.where(Y[..., None] == 255, white, np.where(mask[..., None], magenta, light_grey))

    want = {"image": image.permute(1, 2, 0).numpy(), "truth": colours[Y]}
    want.update(dict.fromkeys(networks, colours[P]))
    if judge:
        want["its errors"] = marked(P != Y)
        want[f"{judge} rejects"] = marked(rejected)
        want["filtered"] = colours[np.where(rejected, 255, P)]
    assert list(shown) == list(want)
    assert all(np.array_equal(shown[name], want[name]) for name in want)


@pytest.mark.parametrize("W, zoom", [(48, 4), (400, 1)])
def test_a_sheet_has_a_row_for_each_image_below_the_captions(W, zoom):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 2, 10, W, 3), np.uint8)
    rows = [dict(zip(("image", "truth"), pair)) for pair in pixels]
    whole = np.asarray(evaluate.sheet(rows, legend={"void": (255, 255, 255)}))
    legend = round(1.5 * 0.75 * W * zoom // 8)  # a line of it below
    whole = whole[:-legend]
    top, w, h = W * zoom // 8, W * zoom + 4, 10 * zoom + 4  # a panel and a line of 4 white pixels beside it
    assert whole.shape == (top + 3 * h + 4, 2 * w + 4, 3)
    blank = whole[top:].copy()
    for j, row in enumerate(rows):
        for i, panel in enumerate(row.values()):
            place = slice(4 + j * h, (j + 1) * h), slice(4 + i * w, (i + 1) * w)
            assert np.array_equal(whole[top:][place], panel.repeat(zoom, 0).repeat(zoom, 1))
            blank[place] = 255
    assert (blank == 255).all()
    captions = whole[:top, 4:w], whole[:top, 4 + w : 2 * w]
    assert (captions[0] != captions[1]).any() and all((caption < 128).any() for caption in captions)


@pytest.mark.parametrize("width, columns", [(60, 1), (200, 3), (330, 5)])
def test_the_legend_adds_rows_of_names_and_colours_under_the_picture(width, columns):
    """A column takes 0.6 of the font's size for each letter, and two lines' heights."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, width, 3), np.uint8)
    names = ["sky", "tree", "river", "house", "\x1b", "rock", "road"]
    legend = {name: (30 * i, 250 - 20 * i, 7) for i, name in enumerate(names)}
    with mock.patch.object(ImageDraw.ImageDraw, "text", autospec=True) as text:
        whole = np.asarray(evaluate.add_legend(Image.fromarray(pixels), legend, font_size=10))
    lines = math.ceil(7 / columns)
    assert whole.shape == (30 + 15 * lines, width, 3)
    assert np.array_equal(whole[:30], pixels)
    for i, (name, colour) in enumerate(legend.items()):
        x, y = 4 + i % columns * (6 * 5 + 2 * 15), 30 + i // columns * 15
        assert (whole[y + 1 : y + 10, x + 1 : x + 10] == colour).all(), name
    written = [call.args[2] for call in text.call_args_list]
    assert written == [*names[:4], "\\x1b", *names[5:]]


@pytest.mark.parametrize("number, want", [
    (0, ""), (1, "a"), (2, "af"), (3, "adg"), (4, "acfh"), (10, "abcdefghij"),
    (99, "abcdefghij"),
])
def test_images_are_spread_over_the_list(number, want):
    assert evaluate.spread(list("abcdefghij"), number) == list(want)


# ---- Prediction ----


@pytest.mark.parametrize("crop", [False, True])
def test_predict_writes_masks_of_the_images_own_size_and_survives_a_broken_one(tmp_path, capsys, crop):
    H, W, out = 20, 30, tmp_path / "out"
    Image.new("RGBA", (W, H), (90, 90, 90, 7)).save(tmp_path / "my.photo.PNG")
    for name in ("broken.jpg", "notes.txt", "._hidden.png"):
        (tmp_path / name).write_text("no image")
    record = {"size": [12, 10], "crop": crop, "palette": PALETTE}
    assert evaluate.predict(Stub().eval(), record, [tmp_path], out, "cpu") == 2
    printed, error = capsys.readouterr()
    assert printed == f"{out}/my.photo_overlay.png\n"
    passed_over, broken = error.splitlines()  # nothing on the hidden file
    line = f"1 files of {tmp_path} are in formats that are not read, such as notes.txt"
    assert passed_over == line
    assert broken.startswith(f"evaluate.py: {tmp_path}/broken.jpg ")
    want = (logits_of(90, H, W) if crop else bilinear(logits_of(90, 12, 10), H, W)).argmax(0).numpy()
    painted = np.array(PALETTE)[want]
    for part, pixels in (("class", want), ("colour", painted), ("overlay", (90 + painted) / 2)):
        shown = np.asarray(Image.open(out / f"my.photo_{part}.png"))
        assert np.abs(shown - pixels).max() <= (1 if part == "overlay" else 0)


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
])
def test_an_image_that_does_not_fit_into_memory_ends_its_own_line_alone(tmp_path, capsys, monkeypatch, error):
    for name, width in (("a", 30), ("b", 60), ("c", 30)):
        Image.new("L", (width, 20), 90).save(tmp_path / f"{name}.png")
    resized_argmax = evaluate.resized_argmax

    def limited(logits, size):
        if size[1] > 30:
            raise error
        return resized_argmax(logits, size)

    monkeypatch.setattr(evaluate, "resized_argmax", limited)
    record, out = {"size": [12, 10], "crop": False, "palette": PALETTE}, tmp_path / "out"
    assert evaluate.predict(Stub().eval(), record, [tmp_path], out, "cpu") == 2
    printed, said = capsys.readouterr()
    assert printed == f"{out}/a_overlay.png\n{out}/c_overlay.png\n"
    assert said == f"evaluate.py: {tmp_path}/b.png does not fit into memory\n"
    monkeypatch.setattr(evaluate, "resized_argmax", mock.Mock(side_effect=RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        evaluate.predict(Stub().eval(), record, [tmp_path / "a.png"], out, "cpu")


LOG = """step,L_sup,mIoU,mIoU_teacher
0,,{stage1},{stage1}
1,0.5,99,99
2,0.5,{student},{teacher}
3,0.4,,
"""


@pytest.mark.parametrize("stage1, student, teacher, used, line", [
    (50, 40, 45, "student",
     "student has mIoU 40.0 in the log, stage 1 has 50.0: --stage 1 takes it"),
    (40, 45, 50, "student",
     "student has mIoU 45.0 in the log, teacher has 50.0: --stage 2 --teacher takes it"),
    (40, 50, 45, "student", ""),
    (50, 50, 50, "student", ""),
    (40, 50, 45, "stage 1",
     "stage 1 has mIoU 40.0 in the log, student has 50.0: --stage 2 without --teacher takes it"),
    (50, 40, 45, "teacher",
     "teacher has mIoU 45.0 in the log, stage 1 has 50.0: --stage 1 takes it"),
    (40, 45, 50, "teacher", ""),
])
def test_a_better_network_is_named(tmp_path, capsys, stage1, student, teacher, used, line):
    file = "stage1.pt" if used == "stage 1" else "stage2.pt"
    run = evaluate.LoadedRun(tmp_path / file, None, None, None)
    args = argparse.Namespace(teacher=used == "teacher")
    evaluate.print_better_network(run, args)
    assert capsys.readouterr() == ("", "")  # there is no log
    (tmp_path / "student_stage1.pt").touch()
    values = dict(stage1=stage1, student=student, teacher=teacher)
    (tmp_path / "log_stage2.csv").write_text(LOG.format(**values))
    evaluate.print_better_network(run, args)
    assert capsys.readouterr() == ("", line + "\n" * bool(line))
    (tmp_path / "student_stage1.pt").unlink()  # as in the folder of --filter threshold
    evaluate.print_better_network(run, args)
    assert "--stage 1 takes" not in capsys.readouterr().err


# ---- Comparison of runs ----


def content(
    stage=2, step=9, rows=(), networks=None, labeled="0123", train=SHAPES.train, **args
):
    """What the train scripts save of a run on six images, those of these numbers labelled."""
    labeled = [train[int(i)] for i in labeled]
    return {
        "stage": stage,
        "args": {**vars(ARGS), **args},
        "step": step,
        "rows": list(rows),
        "networks": networks or {},
        "optimizer": {},
        "scaler": {},
        "classes": SHAPES.classes,
        "labeled": labeled,
        "unlabeled": [key for key in train[:6] if key not in labeled],
        "masks": 0,
    }


def checkpoint(path, *given, **options):
    """Write a checkpoint as the train scripts do. Returns its path."""
    torch.save(content(*given, **options), path)
    return path


def table_of(*checkpoints):
    return evaluate.compare(map(evaluate.run_results, checkpoints)).splitlines()


def scored(mIoU, teacher, **more):
    """A row of stage 2's log."""
    return {"step": 1, "mIoU": mIoU, "mIoU_teacher": teacher, **more}


def test_compare_makes_a_row_of_runs_that_differ_in_split_and_seed():
    begin = {"step": 0, "mIoU": 20.0, "mIoU_teacher": 20.0}
    rows = [begin, {"step": 1}, *(scored(x, 40.0) for x in (10.0, 31.0, 30.0)), {"step": 4}]
    other, eln = [scored(36.0, 42.0)], {"filter": "eln", "lr": 0.1}
    worse = [{"step": 1, "mIoU": 10.0}, {"step": 2, "mIoU": 5.0}]
    head, _, *lines = table_of(
        content(rows=rows, **eln, out="a", labeled_list="x/0.txt"),
        content(rows=other, **eln, out="b", labeled="2345", split=1, seed=5),
        content(rows=rows, labeled="01", filter="none", lr=0.1),
        content(rows=worse, stage=1, step=5, lr=0.1),
        content(stage=1, step=7, lr=0.2),
    )
    columns = "run splits stage_1 mIoU best teacher teacher_best accepted steps"
    assert head == f"| {' | '.join(columns.split())} |"
    assert lines == [  # the sample's deviation of two is their distance over the root of 2
        "| stage 2, filter eln, labeled 4, unlabeled 2 | 2 "
        "| 20.00 | 33.00 ± 4.24 | 33.50 ± 3.54 | 41.00 ± 1.41 | 41.00 ± 1.41 |  | 9 |",
        "| stage 2, filter none, labeled 2, unlabeled 4 | 1 "
        "| 20.00 | 30.00 | 31.00 | 40.00 | 40.00 |  | 9 |",
        "| stage 1, lr 0.1 | 1 |  | 5.00 | 10.00 |  |  |  | 5 of 7 |",  # still in training
        "| stage 1, lr 0.2 | 1 |  |  |  |  |  |  | 7 |",
    ]


def test_runs_of_one_split_are_averaged_first_and_count_as_one():
    def run(stage_1, mIoU, accepted, **options):
        begin = {"step": 0, "mIoU": stage_1, "mIoU_teacher": stage_1}
        rows = [begin, {"step": 1, "accepted": accepted}, scored(mIoU, 40.0, accepted=0.5)]
        return content(rows=rows, **options)

    one, again = run(20.0, 30.0, 0.7), run(22.0, 34.0, 0.3, seed=5)
    two = run(25.0, 36.0, 0.3, labeled="2345", split=1)
    (line,) = table_of(one, again, two)[2:]
    # stage 1: 21 and 25; mIoU: 32 and 36; accepted: (0.6 + 0.4) / 2 and 0.4
    assert line == (
        "| stage 2 | 2 (3 runs) | 23.00 ± 2.83 | 34.00 ± 2.83 | 34.00 ± 2.83 "
        "| 40.00 ± 0.00 | 40.00 ± 0.00 | 0.45 ± 0.07 | 9 |"
    )
    (line,) = table_of(one, again)[2:]
    assert line == "| stage 2 | 1 (2 runs) | 21.00 | 32.00 | 32.00 | 40.00 | 40.00 | 0.50 | 9 |"


def test_two_data_sets_make_two_rows():
    """Also where all options and numbers agree."""
    renamed = dict(content(), classes=[*SHAPES.classes[:-1], "another"])
    others = (content(train=SHAPES.train[100:]), renamed)
    for other in others:
        lines = table_of(content(), other)[2:]
        names = [line.split("|")[1].strip() for line in lines]
        assert len(set(names)) == 2 and all(name.startswith("stage 2, data ") for name in names)
    (line,) = table_of(content(), content(labeled="2345"))[2:]
    assert line.startswith("| stage 2 | 2 |")  # another split of one data set


def test_runs_without_a_checkpoint_are_left_out(said, tmp_path):
    code, out, err = said(f"nothing run early --compare --csv {tmp_path}/all.csv", notes=1)
    assert code == 0 and err == "nothing/stage1.pt does not exist: nothing is left out\n"
    *table, written = out.splitlines()
    assert written == f"a line a run: {tmp_path}/all.csv"
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names == ["stage 2", "stage 1"]
    with open(tmp_path / "all.csv", newline="") as file:
        run, early = csv.DictReader(file)
    assert (run["run"], run["stage"], run["steps"], run["lr"]) == ("run", "2", "6 of 9", "0.25")
    assert (early["run"], early["stage"], early["steps"]) == ("early", "1", "4 of 7")
    assert (run["labeled"], run["unlabeled"], run["classes"]) == ("4", "2", f"{N}")
    code, out, err = said("nothing nowhere --compare", notes=3)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "evaluate.py: there is no checkpoint to compare"


# ---- Reading checkpoints ----


class Bomb:
    """Unpickling it the ordinary way creates the file `trace`."""

    def __reduce__(self):
        return open, ("trace", "w")


HAS_ALL_KEYS = {key: kind() for key, kind in evaluate.CHECKPOINT.items()}
UNREADABLE = {  # what is written, given the bytes of a whole checkpoint: bytes, or something to torch.save
    "nothing": lambda whole: None,
    "empty": lambda whole: b"",
    "zeros": lambda whole: b"\0" * 1000,
    "YAML": lambda whole: b"a: 1\n",
    "pickle": lambda whole: b"G",
    "zip": lambda whole: b"PK\x03\x04" + bytes(200),
    "a tenth": lambda whole: whole[: len(whole) // 10],
    "half": lambda whole: whole[: len(whole) // 2],
    "nine tenths": lambda whole: whole[: len(whole) * 9 // 10],
    "almost all": lambda whole: whole[:-20],
    "one bit flipped": lambda whole: whole[:30000] + bytes([whole[30000] ^ 1]) + whole[30001:],
    "number": lambda whole: 5,
    "list": lambda whole: [1, 2],
    "half a dict": lambda whole: {"args": {}, "step": 3},
    "code": lambda whole: {**HAS_ALL_KEYS, "x": Bomb()},
    "another stage": lambda whole: {**HAS_ALL_KEYS, "stage": 2},
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_checkpoint_is_refused_by_name(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    path, x = tmp_path / "stage1.pt", torch.arange(5000)
    whole = checkpoint(path, 1, networks={"x": x}).read_bytes()
    assert torch.equal(evaluate.read_checkpoint(path, stage=1)["networks"]["x"], x)
    path.unlink()
    content = UNREADABLE[case](whole)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError) as caught:
        evaluate.read_checkpoint(path, stage=1)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("trace").exists()  # no code was run
    pickle.loads(pickle.dumps(Bomb())).close()
    assert Path("trace").exists()  # the bomb is live


OTHER_TYPES = {int: "8", str: 5, bool: 0, list: 5, dict: [1]}


@pytest.mark.parametrize("types", [evaluate.CHECKPOINT, evaluate.STUDENT], ids=["checkpoint", "student"])
def test_an_entry_of_another_type_is_refused_by_name(tmp_path, types):
    path, whole = tmp_path / "file.pt", {key: kind() for key, kind in types.items()}
    torch.save(whole, path)
    assert evaluate.read_checkpoint(path, types) == whole
    for key, kind in types.items():
        others = [{**whole, key: OTHER_TYPES[kind]}, {k: v for k, v in whole.items() if k != key}]
        for content in others:
            torch.save(content, path)
            with pytest.raises(InputError, match=f"file.pt .*has no {key} of type {kind.__name__}"):
                evaluate.read_checkpoint(path, types)
    torch.save({**whole, "rows": [1, 2]}, path)
    with pytest.raises(InputError, match="file.pt has no log"):
        evaluate.read_checkpoint(path, types)


@pytest.mark.parametrize("error, says", [
    (PermissionError(13, "Permission denied"), "Permission denied"), (MemoryError(), "out of memory"),
])
def test_why_a_good_file_cannot_be_read_is_said(monkeypatch, error, says):
    monkeypatch.setattr(evaluate, "load_tensors", mock.Mock(side_effect=error))
    with pytest.raises(InputError, match=f"stage1.pt cannot be read .*{says}"):
        evaluate.read_checkpoint("stage1.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_checkpoint(tmp_path):
    """Reading one waits forever for a process that writes."""
    os.mkfifo(tmp_path / "stage1.pt")
    with pytest.raises(InputError, match="stage1.pt is damaged"):
        evaluate.read_checkpoint(tmp_path / "stage1.pt")


@pytest.fixture(scope="module")
def networks():
    """Stage 2's, and stage 1's (before), with BatchNorm statistics unlike fresh ones."""
    torch.manual_seed(0)
    nets = nn.ModuleDict()
    for name in ("student", "teacher", "before"):
        nets[name] = DeepLabV3Plus(N, "resnet18", "none", 8)
        nets[name].decoder.seg[-1].bias.data[N - 1] = -100  # the last class is never predicted
    nets["auxiliary"] = AuxiliaryNetworks(N, nets["student"].encoder, ARGS)
    image = torch.randn(2, 3, 32, 32) + 1
    nets.requires_grad_(False)["teacher"](image)
    nets["before"](image)
    logits, _, encoded = nets["student"](image)
    nets["auxiliary"](image, logits, *encoded)
    return nets.eval().to(memory_format=torch.channels_last)


def student(path, network, **changes):
    """Write a student's file as the train scripts do. Returns its path."""
    record = {"network": network.state_dict(), "backbone": "resnet18", "width": 8, "classes": SHAPES.classes}
    record.update(palette=SHAPES.palette[:N].tolist(), size=[32, 32], crop=False, step=6)
    torch.save({**record, **changes}, path)
    return path


def test_a_saved_student_predicts_the_same(tmp_path, networks):
    network, record = evaluate.load_student(student(tmp_path / "s.pt", networks["student"]))
    X = torch.randn(2, 3, 40, 33)
    assert not network.training and torch.equal(network(X)[0], networks["student"](X)[0])
    assert (record["classes"], record["size"], record["crop"]) == (SHAPES.classes, [32, 32], False)
    with pytest.raises(InputError, match="s.pt .*other networks.*size mismatch"):
        evaluate.load_student(student(tmp_path / "s.pt", networks["student"], width=16))


@pytest.mark.parametrize("changes, says", [
    ({"backbone": "vgg"}, "the backbone vgg"), ({"width": 0}, "the width 0"),
    ({"size": [0, -5]}, r"the size \[0, -5\]"), ({"size": [32]}, r"the size \[32\]"),
])
def test_a_student_of_senseless_settings_is_refused(tmp_path, networks, changes, says):
    with pytest.raises(InputError, match=f"s.pt has .*{says}"):
        evaluate.load_student(student(tmp_path / "s.pt", networks["student"], **changes))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_student_that_is_not_finite_is_refused(tmp_path, networks, value):
    network = copy.deepcopy(networks["student"])
    network.decoder.seg[-1].bias[0] = value
    with pytest.raises(InputError, match="s.pt has weights that are not finite"):
        evaluate.load_student(student(tmp_path / "s.pt", network))


@pytest.mark.parametrize("stage, step, trained", [(1, 4, False), (1, 5, True), (2, 1, True)])
def test_eln_is_read_from_a_checkpoint_that_has_trained_it(networks, stage, step, trained):
    state = networks.state_dict()
    content = {"stage": stage, "step": step, "classes": SHAPES.classes, "args": vars(ARGS), "networks": state}
    eln, x = evaluate.load_eln("stage.pt", content), torch.randn(1, 3 + N + 1, 32, 32)
    if trained:
        assert torch.equal(eln(x), networks["auxiliary"].eln(x)) and not eln.training
    else:
        assert eln is None
    state["auxiliary.eln.more"] = torch.zeros(1)
    with pytest.raises(InputError, match="s.pt .*more") if trained else contextlib.nullcontext():
        evaluate.load_eln("s.pt", content)
    content["networks"] = networks["student"].state_dict(prefix="student.")
    assert evaluate.load_eln("s.pt", content) is None


# ---- Command line ----


@pytest.fixture(scope="module")
def place(tmp_path_factory, networks):
    """Runs: `run` in stage 2, `early` before ELN is trained."""
    root = tmp_path_factory.mktemp("place")
    for run, stage, step in (("run", 2, 6), ("run", 1, 7), ("early", 1, 4)):
        path = root / run / f"stage{stage}.pt"
        path.parent.mkdir(exist_ok=True)
        checkpoint(path, stage, step, networks=networks.state_dict() if stage == 2 else None)
        network = networks["student" if stage == 2 else "before"]
        student(path.with_name(f"student_{path.name}"), network, step=step)
    return root


@pytest.fixture
def said(place, capsys, monkeypatch):
    """said(command line) -> exit code, stdout, stderr of evaluate.py.

    Code 1 or 2 has one line of stderr, 0 none; `notes` is how many lines are expected instead.
    """
    monkeypatch.chdir(place)
    monkeypatch.setattr(data, "load_dataset", lambda *names: dataclasses.replace(SHAPES, val=SCORED))

    def run(line, notes=None):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *line.split(), "--device", "cpu"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(evaluate.__file__, run_name="__main__")
        out, err = capsys.readouterr()
        expected = stop.value.code in (1, 2) if notes is None else notes
        assert err.count("\n") == expected, err
        return stop.value.code or 0, out, err

    return run


@pytest.mark.parametrize("options, step, who, captions", [
    ("run", 6, "student", ["stage 1", "student", "teacher"]),
    ("run --teacher", 6, "teacher", ["stage 1", "student", "teacher"]),
    ("early", 4, "student", ["stage 1"]),
])
@pytest.mark.parametrize("listed", [False, True])
def test_scores_of_all_networks_stand_side_by_side(
    said, networks, monkeypatch, tmp_path, options, step, who, captions, listed
):
    keys, images = SCORED, "2 validation images"
    if listed:
        keys, images = SHAPES.train[7:10], "3 listed images"
        (tmp_path / "ids.txt").write_text("\n".join(keys))
        options += f" --list {tmp_path}/ids.txt"
    monkeypatch.setattr(SHAPES, "val", keys)
    names = {"stage 1": "before", "student": "student", "teacher": "teacher"}
    matrices = {key: evaluate.score(networks[names[key]], SHAPES, (32, 32)) for key in captions}
    columns = [matrix["resized"] for matrix in matrices.values()]
    columns.append(matrices[who if step == 6 else "stage 1"]["original"])
    rows = list(zip(*([*evaluate.iou(m).tolist(), evaluate.mean_iou(m)] for m in columns)))
    title, head, *lines = said(options)[1].splitlines()
    assert f"step {step}, {who}: IoU in percent, {images}" in title
    assert head.replace(" ", "") == "class" + "".join([*captions, "ownsize"]).replace(" ", "")
    for name, row, line in zip([*SHAPES.classes, "mean"], rows, lines):
        assert line.split()[0] == name
        assert list(map(float, line.split()[1:])) == pytest.approx(row, abs=0.006, nan_ok=True)
    occur = [sum(x == x for x in column[:-1]) for column in zip(*rows)]
    if min(occur) < N:
        assert lines[-1].startswith(f"means over {occur} of {N} classes")
    assert len(lines) == N + 1 + (min(occur) < N) and (listed or min(occur) < N)


@pytest.mark.parametrize("teacher, title", [
    (False, "stage2, step 8, student:"), (True, "stage2, step 6, teacher:"),
])
def test_the_title_has_the_step_of_the_network_that_is_scored(teacher, title):
    """A kill between two renames leaves a student that is newer than the checkpoint."""
    run = evaluate.LoadedRun(Path("run/stage2.pt"), {"step": 6}, None, {"step": 8})
    assert evaluate.title(run, argparse.Namespace(teacher=teacher)) == title


def test_files_of_stage_1_are_not_taken_for_those_of_stage_2(said):
    Path("renamed").mkdir()
    for name in ("stage", "student_stage"):
        os.link(f"early/{name}1.pt", f"renamed/{name}2.pt")
    wanted = "evaluate.py: renamed/stage2.pt is not a checkpoint of stage 2\n"
    assert said("renamed") == (2, "", wanted)


def test_the_name_of_a_class_does_not_steer_the_terminal(monkeypatch, capsys):
    matrices = dict.fromkeys(("resized", "original"), torch.eye(2).long())
    monkeypatch.setattr(evaluate, "score", lambda *args: matrices)
    dataset = dataclasses.replace(SHAPES, classes=["sky", "\x1b[2J"])
    run = evaluate.LoadedRun(Path("run/stage1.pt"), {"stage": 1}, None, {"step": 8, "size": [32, 32]})
    args = argparse.Namespace(teacher=False, workers=0, list=None)
    evaluate.print_scores(run, dataset, args, "cpu")
    assert r"\x1b[2J" in (out := capsys.readouterr().out) and "\x1b" not in out


def test_figures_and_errors_are_of_unlabelled_images_with_masks(said):
    out = said("run --error-localization")[1]
    assert "2 unlabelled images" in out and "ELN         error       AP" in out
    shown = said("run --figures 1")[1]
    assert shown.startswith("ELN and plain confidence each order the pixels of 2 unlabelled images")
    assert shown.endswith("\nfigures: run/figures/student.png\n")


@pytest.mark.parametrize("corrector, of_eln, better", [
    ("ELN", 0.5, "ELN"), ("ELN", 0.3, "confidence"), ("s-ECN", 0.5, "s-ECN"),
])
def test_two_sentences_say_which_of_eln_and_confidence_finds_errors_better(
    monkeypatch, capsys, corrector, of_eln, better
):
    table = {(corrector, "error", "image"): [9, 9, 9], (corrector, "error", "AP"): [of_eln]}
    table.update({("confidence", "error", "AP"): [0.4], ("none", "error", "AP"): [0.125]})
    monkeypatch.setattr(evaluate, "error_localization", lambda *args: table)
    monkeypatch.setattr(evaluate, "load_eln", mock.Mock())
    run = evaluate.LoadedRun(Path("run/stage2.pt"), {"unlabeled": SHAPES.train}, None, {"size": [32, 32]})
    args = argparse.Namespace(teacher=False, workers=0, list=None, threshold=0.9)
    evaluate.print_average_precision(run, SHAPES, args, "cpu")
    sentences = capsys.readouterr().out.replace("\n", " ").split(". ")
    assert sentences[0].endswith("the student come first, and 0.125 by chance")
    assert sentences[1].startswith(f"{corrector} has {of_eln:.3f} and confidence 0.400: here {better} finds")


def test_without_masks_of_unlabelled_images_those_of_validation_are_drawn(said, monkeypatch):
    bare = dataclasses.replace(SHAPES, val=SCORED, files=dict.fromkeys(SHAPES.files, ("drawn", None)))
    monkeypatch.setattr(data, "load_dataset", lambda *names: bare)
    assert "2 validation images" in said("early --error-localization")[1]
    said("early --figures 9")
    legend = 27 * math.ceil((N + 1) / 3)  # lines of classes and void, three in each
    assert Image.open("early/figures/stage1.png").height == 24 + 4 + len(SCORED) * 196 + legend


def test_captions_lack_what_all_runs_paths_begin_with(said, monkeypatch):
    for name in ("long-name-one", "long-name-two"):
        Path(name).mkdir()
        for file in ("stage1.pt", "student_stage1.pt"):
            os.link(f"early/{file}", f"{name}/{file}")
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text := mock.Mock())
    said("long-name-one long-name-two --figures 1")
    written = [call.args[1] for call in text.call_args_list]
    assert written == ["image", "truth", "one", "two", *SHAPES.classes, "void"]


@pytest.mark.parametrize("options, name", [
    ("run", "student"), ("run --teacher", "teacher"), ("run --stage 1", "stage1"),
])
def test_figures_and_predictions_are_named_after_their_network(said, tmp_path, options, name):
    Image.new("RGB", (40, 36), (200, 150, 90)).save(tmp_path / "photo.png")
    assert said(f"{options} --figures 1")[1].endswith(f"figures: run/figures/{name}.png\n")
    predicted = f"run/predictions/{name}/photo_overlay.png"
    assert said(f"{options} --predict {tmp_path}/photo.png")[1] == f"{predicted}\n"
    assert Path(f"run/figures/{name}.png").exists() and Path(predicted).exists()


def test_segment_gives_in_ones_own_code_what_predict_writes(said, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)).save(photo)
    said(f"run --predict {photo} --out {tmp_path}")
    student, record = evaluate.load_student("run/student_stage2.pt")
    pictures = evaluate.segment(student, record, str(photo))
    assert set(pictures) == {"class", "colour", "overlay"}
    for kind, picture in pictures.items():
        assert np.array_equal(picture, np.asarray(Image.open(tmp_path / f"photo_{kind}.png")))


def test_out_takes_figures_and_predictions(said, tmp_path):
    Image.new("RGB", (40, 36), (200, 150, 90)).save(tmp_path / "photo.png")
    out = tmp_path / "a" / "b"
    assert said(f"early --figures 1 --out {out}")[1].endswith(f"figures: {out}/stage1.png\n")
    said(f"early --predict {tmp_path}/photo.png --out {out}")
    photos = {f"photo_{kind}.png" for kind in ("class", "colour", "overlay")}
    assert {path.name for path in out.iterdir()} == {"stage1.png", *photos}


def test_ids_of_a_list_are_drawn_in_the_place_of_all_others(said, tmp_path):
    keys = SHAPES.train[7:9]
    (tmp_path / "ids.txt").write_text("\n".join(keys))
    said(f"run --list {tmp_path}/ids.txt --figures 9 --out {tmp_path}")
    whole = np.asarray(Image.open(tmp_path / "student.png"))
    for row, key in enumerate(keys):
        image = resize(SHAPES.read_pair(key)[0], (32, 32)).permute(1, 2, 0).numpy()
        place = 24 + 4 + row * 196
        assert np.array_equal(whole[place : place + 192 : 6, 4:196:6], image)
    out = said(f"run --list {tmp_path}/ids.txt --error-localization")[1]
    assert "2 listed images" in out


def test_several_runs_are_drawn_side_by_side(said):
    assert said("early run --figures 1")[1] == "figures: early/figures/compare.png\n"
    whole = np.asarray(Image.open("early/figures/compare.png"))
    early, run = [whole[:24, 4 + i * 196 : (i + 1) * 196] for i in (2, 3)]  # behind image and truth
    assert early.shape == run.shape and (early != run).any()  # the captions


@pytest.mark.parametrize("options, says", [
    ("early --teacher", "of stage 1"), ("run early", "--compare"),
    ("run --compare --teacher", "--teacher do not"), ("run --csv x.csv", "--csv goes with"),
    ("early --predict no.png", "no.png"), ("no_run", "no_run/student_stage1.pt does not exist"),
    ("early --predict a/v.png v.png", "v.png and a/v.png would give the same files"),
])
def test_what_cannot_be_used_is_refused_in_one_line(said, options, says):
    code, out, err = said(options)
    assert (code, out) == (2, "") and err.startswith("evaluate.py: ") and says in err


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (OSError("full"), 1)])
def test_exit_codes(said, monkeypatch, error, code):
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", mock.Mock(side_effect=error))
    assert said("run") == (code, "", "evaluate.py: full\n" * (code == 1))


def test_the_teacher_predicts_and_strange_names_are_printed(said, networks, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)
    Image.fromarray(image).save("größe.png")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True))
    assert said("run --teacher --predict größe.png")[0] == 0
    assert sys.stdout.buffer.getvalue() == b"run/predictions/teacher/gr??e_overlay.png\n"
    X = normalize(resize(torch.from_numpy(image).permute(2, 0, 1), (32, 32)))[None]
    want = bilinear(networks["teacher"](X)[0][0], 40, 36).argmax(0).numpy()
    predicted = np.asarray(Image.open("run/predictions/teacher/größe_class.png"))
    assert (predicted != want).mean() < 0.01  # but for ties
