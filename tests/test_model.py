"""Tests of model.py and eln.py, against torchvision's own networks, literal loops and hand-written tables.

    python -m pytest tests/test_model.py        (from the root; a few seconds on a CPU)

The tests write the weights files themselves; nothing is downloaded.
"""

import argparse
import math
import pickle
import urllib.error
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn

from data import Process
from eln import AuxiliaryNetworks, ErrorLocalizationNetwork, ecn_loss, eln_input, valid_logit_of
from model import ASPP, BACKBONES, Decoder, DeepLabV3Plus, Encoder, WeightsError
from small_networks import small_resnet
from train_stage1 import prepare

COUNT = "num_batches_tracked"
CHANNELS = {"resnet18": (64, 512), "resnet34": (64, 512), "resnet50": (256, 2048), "resnet101": (256, 2048)}


def without(state, part):
    return {key: value for key, value in state.items() if part not in key}


def of_backbone(state):
    """Without the classifier, and without BatchNorm's counts, on which no output depends."""
    return without(without(state, "fc."), COUNT)


@pytest.fixture
def small(monkeypatch):
    """Every backbone is a small ResNet."""
    monkeypatch.setattr(torchvision.models, "get_model", small_resnet)


@pytest.fixture(scope="module")
def state():
    """A state dict of the small ResNet with random entries, so that one that is not loaded shows."""
    generator = torch.Generator().manual_seed(1)
    return {
        key: torch.rand(value.shape, generator=generator) + 0.5 if COUNT not in key else torch.tensor(7)
        for key, value in small_resnet("small", "none").state_dict().items()
    }


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- The segmentation network ----


@pytest.mark.parametrize("name", BACKBONES)
def test_encoder_is_torchvisions_resnet_with_layer4_dilated(name):
    reference, encoder = torchvision.models.get_model(name, weights=None).eval(), Encoder(name).eval()
    for module in reference.modules():  # a fresh BatchNorm is the identity: statistics would not show
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    theirs = without(reference.state_dict(), "fc.")
    own = encoder.resnet.state_dict()
    assert [(key, value.shape) for key, value in own.items()] == [
        (key, value.shape) for key, value in theirs.items()
    ]
    encoder.resnet.load_state_dict(theirs)
    X = torch.randn(2, 3, 65, 50)
    with torch.no_grad():
        low, high = encoder(X)
    assert low.shape == (2, CHANNELS[name][0], 17, 13)  # ceil(65 / 4), ceil(50 / 4)
    assert high.shape == (2, CHANNELS[name][1], 5, 4)  # ceil(65 / 16), ceil(50 / 16)
    assert encoder.channels == CHANNELS[name]

    layer4 = encoder.resnet.layer4
    convolutions = [module for module in layer4.modules() if isinstance(module, nn.Conv2d)]
    assert all(module.stride == (1, 1) for module in convolutions)
    wide = [module for module in convolutions if module.kernel_size == (3, 3)]
    assert len(wide) == (4 if name == "resnet18" else 6 if name == "resnet34" else 3)
    assert all(module.dilation == module.padding == (2, 2) for module in wide)

    # the same with strides and dilations put back must be torchvision's network
    for module in wide:
        module.dilation = module.padding = (1, 1)
    first = layer4[0].conv1 if name in ("resnet18", "resnet34") else layer4[0].conv2
    first.stride = layer4[0].downsample[0].stride = (2, 2)
    seen = {}
    reference.layer1.register_forward_hook(lambda *call: seen.update(low=call[-1]))
    reference.layer4.register_forward_hook(lambda *call: seen.update(high=call[-1]))
    with torch.no_grad():
        reference(X)
        undone = encoder(X)
    torch.testing.assert_close(undone, (seen["low"], seen["high"]))
    assert undone[1].shape[2:] == (3, 2)


def test_aspp_image_branch_trains_on_one_image(small):
    aspp = ASPP(6, 4, dropout=0.0).train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in aspp.image.modules())
    weight, bias = aspp.image[1].weight[:, :, 0, 0], aspp.image[1].bias
    seen = []
    aspp.project[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    high = torch.randn(1, 6, 3, 2)
    assert aspp(high).shape == (1, 4, 3, 2)
    want = (weight @ high[0].mean((1, 2)) + bias).clamp(min=0)
    assert want.max() > 0
    torch.testing.assert_close(seen[0][0, -4:], want[:, None, None].expand(4, 3, 2))
    DeepLabV3Plus(3, "resnet18", width=8).train()(torch.randn(1, 3, 32, 32), embed=True)


def test_decoder_has_the_layers_of_deeplabv3plus():
    decoder = Decoder(64, 512, 5, width=16, proj=True)
    convolutions = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)]
    found = [(m.in_channels, m.out_channels, m.kernel_size[0], m.dilation[0]) for m in convolutions]
    aspp = [(512, 16, 1, 1), (512, 16, 3, 6), (512, 16, 3, 12), (512, 16, 3, 18), (512, 16, 1, 1)]
    low_and_fuse = [(64, 48, 1, 1), (64, 16, 3, 1), (16, 16, 3, 1)]
    heads = [(16, 16, 1, 1), (16, 5, 1, 1), (16, 16, 1, 1), (16, 128, 1, 1)]
    assert found == [*aspp, (5 * 16, 16, 1, 1), *low_and_fuse, *heads]
    assert Decoder(64, 512, 5, width=16).proj is None


def test_segmentation_network_returns_logits_at_the_images_size():
    network = DeepLabV3Plus(5, "resnet18", width=8).eval()
    X = torch.randn(2, 3, 65, 50)
    logits, feature, (low, high) = network(X, embed=True)
    assert logits.shape == (2, 5, 65, 50) and feature.shape == (2, 128, 17, 13)
    assert low.shape == (2, 64, 17, 13) and high.shape == (2, 512, 5, 4)
    again, none, _ = network(X)
    assert none is None and torch.equal(again, logits)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(X)[0]
    assert half.dtype == torch.float32
    assert (half != half.bfloat16()).any()  # made float32 before the interpolation, not after
    assert not torch.equal(half, logits)  # autocast was on
    assert network.double()(X.double())[0].dtype == torch.float64


# ---- Reading weights ----


@pytest.mark.parametrize(
    "change, dtype",
    [
        (lambda state: state, torch.float32),
        (lambda state: OrderedDict(without(state, "fc.")), torch.float32),
        (lambda state: without(state, COUNT), torch.float32),
        (lambda state: {key: value.half() for key, value in without(state, "fc.").items()}, torch.float16),
        (lambda state: {key: value.bfloat16() for key, value in state.items()}, torch.bfloat16),
        (lambda state: {key: value.double() for key, value in state.items()}, torch.float64),
    ],
    ids=["full", "no fc", "no counts", "float16 no fc", "bfloat16", "float64"],
)
def test_every_value_of_a_weights_file_is_loaded(small, tmp_path, state, change, dtype):
    torch.save(change(state), tmp_path / "w.pth")
    loaded = of_backbone(Encoder("resnet18", str(tmp_path / "w.pth")).resnet.state_dict())
    assert loaded.keys() == of_backbone(state).keys()
    for key, value in loaded.items():
        assert value.dtype == torch.float32 and torch.equal(value, state[key].to(dtype).float()), key


class Bomb:
    """Unpickling it the ordinary way creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


REFUSED = {  # what the file holds, and words of the message
    "another network": (lambda s: torchvision.models.resnet18().state_dict(), ["resnet18", "layer1.0"]),
    "a key too few": (lambda s: without(s, "layer1.0.bn1.bias"), ["layer1.0.bn1.bias"]),
    "a key too many": (lambda s: {**s, "layer5.bias": torch.zeros(1)}, ["layer5.bias"]),
    "a wrong shape": (lambda s: {**s, "bn1.bias": torch.zeros(3)}, ["bn1.bias"]),
    "no tensor": (lambda s: {**s, "bn1.bias": 3.0}, ["bn1.bias"]),
    "another count": (lambda s: {**s, "layer5." + COUNT: torch.tensor(0)}, ["layer5." + COUNT]),
    "a wrapped dict": (lambda s: {"state_dict": s}, ["bn1.bias", "bn1.running_mean"]),
    "a list": (lambda s: list(s.values()), ["list"]),
    "a tensor": (lambda s: s["conv1.weight"], ["Tensor"]),
    "no file": (lambda s: None, ["No such file"]),
    "an empty file": (lambda s: b"", []),
    "zeros": (lambda s: b"\0" * 1000, []),
    "a zip's beginning": (lambda s: b"PK\x03\x04" + bytes(range(200)), []),
    "hello": (lambda s: b"hello", []),
    "a: 1": (lambda s: b"a: 1\n", []),
    "G": (lambda s: b"G", []),  # these three make the unpickler raise KeyError, IndexError, struct.error
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsuitable_weights_file_is_refused_by_name(small, tmp_path, state, case):
    make, words = REFUSED[case]
    path, content = tmp_path / "w.pth", make(state)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError) as caught:
        Encoder("resnet18", str(path))
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, 2))])
def test_code_in_a_weights_file_never_runs(small, tmp_path, write):
    bomb, trace = Bomb(tmp_path / "trace"), tmp_path / "trace"
    pickle.loads(pickle.dumps(bomb)).close()
    assert trace.exists()  # the bomb is live
    trace.unlink()
    write({"conv1.weight": bomb}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="w.pth"):
        Encoder("resnet18", str(tmp_path / "w.pth"))
    assert not trace.exists()


def test_imagenet_loads_what_torchvision_downloads(small, monkeypatch, state):
    asked = []

    def download(self, **options):
        asked.append(self.name)
        return state

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", download)
    loaded = of_backbone(Encoder("resnet18", "imagenet").resnet.state_dict())
    assert asked == ["IMAGENET1K_V1"]
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


@pytest.mark.parametrize(
    "name, file, error",
    [
        ("resnet18", "resnet18-f37072fd.pth", urllib.error.URLError("no route")),
        ("resnet50", "resnet50-0676ba61.pth", RuntimeError("invalid hash value")),  # version 1 of the two
    ],
)
def test_imagenet_without_a_network_ends_in_one_line(small, monkeypatch, name, file, error):
    def fail(self, **options):
        raise error

    monkeypatch.setattr(torchvision.models.get_model_weights(name), "get_state_dict", fail)
    with pytest.raises(WeightsError) as caught:
        Encoder(name, "imagenet")
    message = str(caught.value)
    assert file in message and "--weights none" in message and "\n" not in message


# ---- ELN and the auxiliary decoders ----


def test_eln_input_is_image_probabilities_entropy():
    B, C, H, W = 2, 4, 3, 5
    image = torch.randn(B, 3, H, W)
    logits = (3 * torch.randn(B, C, H, W)).requires_grad_()
    with torch.no_grad():
        logits[0, :, 0, 0] = torch.tensor([900.0, -900, 0, 0])  # certain: entropy 0, not nan
        logits[0, :, 0, 1] = 7.0  # undecided: entropy log C
    x = eln_input(image, logits)
    assert x.shape == (B, 3 + C + 1, H, W) and not x.requires_grad
    for b in range(B):
        for i in range(H):
            for j in range(W):
                values = [float(v) for v in logits[b, :, i, j].detach()]
                powers = [math.exp(v - max(values)) for v in values]
                P = [power / sum(powers) for power in powers]
                E = -sum(p * math.log(p) for p in P if p > 0)
                want = torch.tensor([*image[b, :, i, j].tolist(), *P, E])
                torch.testing.assert_close(x[b, :, i, j], want, atol=1e-6, rtol=1e-5)
    assert x[0, -1, 0, 0] == 0 and x[0, -1, 0, 1] == pytest.approx(math.log(C))


def test_eln_keeps_the_rgb_filters_and_loads_every_other_tensor(small, tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    eln = ErrorLocalizationNetwork(5, "resnet18", str(tmp_path / "w.pth"), width=8)
    loaded = of_backbone(eln.encoder.resnet.state_dict())
    assert loaded.keys() == of_backbone(state).keys()
    first = loaded.pop("conv1.weight")
    assert first.shape == (64, 3 + 5 + 1, 7, 7)
    assert torch.equal(first[:, :3], state["conv1.weight"])
    fresh = first[:, 3:]
    assert fresh.std() > 0 and fresh.abs().max() < 0.5  # the file's values are 0.5 and above
    for key, value in loaded.items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("outputs, shape", [(1, (1, 65, 50)), (5, (1, 5, 65, 50))])
def test_eln_judges_each_pixel_and_with_C_outputs_corrects_it(small, outputs, shape):
    eln = ErrorLocalizationNetwork(5, "resnet18", width=8, out_channels=outputs)
    x = eln_input(torch.randn(1, 3, 65, 50), torch.randn(1, 5, 65, 50))
    assert eln(x).shape == shape


def make_networks(backbone_lr=None):
    """The networks of stage 1, and their arguments."""
    args = argparse.Namespace(
        eln_backbone="resnet18", eln_weights="none", width=16, corrector="eln", alphas=[20.0, 50.0], lr=1e-4,
        backbone_lr=backbone_lr, weight_decay=0, amp="off",
    )
    main = DeepLabV3Plus(4, "resnet18", "none", 16)
    return nn.ModuleDict({"main": main, "auxiliary": AuxiliaryNetworks(4, main.encoder, args)}), args


def test_dropout_rates_are_the_released_ones(small):
    def found(module):
        return [m.p for m in module.modules() if isinstance(m, nn.Dropout)]

    nets, _ = make_networks()
    assert found(nets.main) == [0.1, 0.5, 0.1]
    assert [found(decoder) for decoder in nets.auxiliary.decoders] == 2 * [[0.1, 0.5, 0.1]]
    assert found(nets.auxiliary.eln) == [0.5, 0.5, 0.1]


def test_every_parameter_gets_a_gradient(small):
    nets = make_networks()[0].train()
    image = torch.randn(2, 3, 64, 64)
    logits, feature, encoded = nets.main(image, embed=True)
    aux_logits, valid_logits = nets.auxiliary(image, logits, *encoded)
    outputs = [logits, feature, *aux_logits, *valid_logits]
    sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
    assert [name for name, p in nets.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_what_the_auxiliary_networks_read_is_constant(small):
    nets = make_networks()[0].train()
    image = torch.randn(2, 3, 32, 32)
    logits, _, encoded = nets.main(image)
    aux_logits, valid_logits = nets.auxiliary(image, logits, *encoded)
    assert len(aux_logits) == 2 and len(valid_logits) == 3
    (sum(valid_logits) * torch.randn_like(valid_logits[0])).sum().backward(retain_graph=True)
    assert all(p.grad is None for p in nets.auxiliary.decoders.parameters())  # D^k learn nothing from ELN
    sum((P * torch.randn_like(P)).sum() for P in aux_logits).backward()
    assert any(p.grad.any() for p in nets.auxiliary.decoders.parameters())
    assert all(p.grad is None for p in nets.main.parameters())


# ---- The s-ECN ----


def test_ecn_loss_is_the_mean_cross_entropy_of_the_corrections():
    corrections = [torch.randn(2, 3, 1, 2, dtype=torch.float64).requires_grad_() for _ in range(2)]
    label = torch.tensor([[[0, 255]], [[2, 1]]])
    terms = []
    for output in corrections:
        for image, pixels in ((0, [0]), (1, [0, 1])):  # those that are not void
            of_image = []
            for x in pixels:
                powers = [math.exp(score) for score in output[image, :, 0, x].tolist()]
                of_image.append(-math.log(powers[label[image, 0, x]] / sum(powers)))
            terms.append(sum(of_image) / len(of_image))
    loss = ecn_loss(corrections, None, label)
    assert loss.item() == pytest.approx(sum(terms) / 4, abs=1e-9)
    assert torch.autograd.gradcheck(lambda *outputs: ecn_loss(outputs, None, label), corrections)


def test_valid_logit_is_elns_or_how_far_the_s_ecn_prefers_the_predicted_class():
    logits = torch.tensor([[1.0, 5.0], [3.0, 2.0], [2.0, 1.0]])[None, :, None]  # classes 1 and 0
    output = torch.tensor([[-2.0, 1.5], [4.0, 7.0], [2.5, 3.0]])[None, :, None]
    assert valid_logit_of(output, logits).tolist() == [[[4 - 2.5, 1.5 - 7]]]
    valid_logit = torch.randn(1, 1, 2)
    assert torch.equal(valid_logit_of(valid_logit, logits), valid_logit)


# ---- AdamW, which train_stage1.py makes ----


@pytest.mark.parametrize("backbone_lr, expected", [(None, 1e-4), (1e-5, 1e-5)])
def test_every_parameter_is_optimized_and_encoders_have_their_own_rate(small, backbone_lr, expected):
    nets, args = make_networks(backbone_lr)
    optimizer = prepare(nets, args, Process())[2]
    pairs = [(id(p), group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    rates = dict(pairs)
    assert len(pairs) == len(rates) and rates.keys() == {id(p) for p in nets.parameters()}
    in_encoders = {id(p) for net in (nets.main, nets.auxiliary.eln) for p in net.encoder.parameters()}
    assert all(rate == (expected if key in in_encoders else 1e-4) for key, rate in pairs)
    norms = [module for module in nets.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 50 and all(id(p) in rates for norm in norms for p in (norm.weight, norm.bias))
