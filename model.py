"""DeepLabv3+ with a ResNet backbone: the segmentation network of Sec. 4.1.

An encoder (torchvision's ResNet at output stride 16) and a decoder (ASPP, low-level branch, two heads), of
which eln.py makes the auxiliary decoders and ELN too. Stride 4 means ceil(H/4) x ceil(W/4).
"""

import warnings
import zipfile

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import Conv2dNormActivation as ConvBNReLU  # keeps the size; no bias

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
EMBEDDING = 128  # D, the projector's output


class WeightsError(ValueError):
    """A backbone's weights cannot be had, or belong to another network. The message says which and why."""


def load_tensors(path):
    """What torch.save wrote to a file, on the CPU; tensors and plain values alone, no code is run.

    Raises ValueError where the file's checksums show damage, which torch.load ignores; else as it."""
    if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
        raise ValueError(f"{path} is damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of noise torch.load suspects a newer format, before it fails
        return torch.load(path, map_location="cpu", weights_only=True)


def load_backbone_weights(resnet, name, weights):
    """Fill a torchvision ResNet, in place, strictly: each entry must be there and fit.

    resnet   the network, its `fc` included, which stays as it is; name: one of BACKBONES
    weights  "none" (nothing is done), "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), or the path
             of a torchvision state dict of any floating-point type, with `fc.*` and BatchNorm's counts or not
    Raises WeightsError if they cannot be had, or are not this network's."""
    if weights == "none":
        return
    imagenet = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    source = imagenet.url if weights == "imagenet" else weights
    own = {key: value for key, value in resnet.state_dict().items() if "fc." in key or "num_batches" in key}
    try:
        state = imagenet.get_state_dict(check_hash=True) if source != weights else load_tensors(weights)
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        resnet.load_state_dict({**own, **state})
    except Exception as error:  # damaged bytes reach the readers as errors of many kinds
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"weights {source} cannot be used for {name} ({reason}); give the path of a torchvision state "
            "dict, or start from --weights none --eln-weights none"
        ) from None


class Encoder(nn.Module):
    """E: a torchvision ResNet of BACKBONES without its classifier, at output stride 16; weights as above."""

    def __init__(self, backbone="resnet50", weights="none"):
        super().__init__()
        resnet = torchvision.models.get_model(backbone, weights=None)
        load_backbone_weights(resnet, backbone, weights)
        # torchvision's own switch for dilation refuses the basic block of ResNet-18 and 34
        for module in resnet.layer4.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (2, 2)
        self.channels = resnet.fc.in_features // 8, resnet.fc.in_features  # of low, high
        del resnet.fc
        self.resnet = resnet

    def forward(self, x):
        """(B, 3, H, W) float -> low (B, 64 or 256, stride 4), high (B, 512 or 2048, stride 16)."""
        r = self.resnet
        x = r.maxpool(r.relu(r.bn1(r.conv1(x))))
        low = r.layer1(x)
        high = r.layer4(r.layer3(r.layer2(low)))
        return low, high


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: what lies at rates 1, 6, 12, 18 and the whole image, side by side. The
    image's branch has no BatchNorm: of one image per process it would see a single value."""

    def __init__(self, in_channels, width, dropout):
        super().__init__()
        self.rates = nn.ModuleList([ConvBNReLU(in_channels, width, 1)])
        self.rates.extend(ConvBNReLU(in_channels, width, 3, dilation=rate) for rate in (6, 12, 18))
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, width, 1), nn.ReLU())
        self.project = nn.Sequential(ConvBNReLU(5 * width, width, 1), nn.Dropout(dropout))

    def forward(self, high):
        """(B, in_channels, h, w) -> (B, width, h, w)."""
        image = self.image(high).expand(-1, -1, *high.shape[2:])
        return self.project(torch.cat([*(rate(high) for rate in self.rates), image], dim=1))


def head(width, out_channels):
    """Seg and Proj of Sec. 4.1: two 1x1 convolutions and a ReLU between them."""
    return nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, out_channels, 1))


class Decoder(nn.Module):
    """D, and each auxiliary D^k: ASPP, DeepLabv3+'s low-level branch, heads Seg and (main decoder only) Proj.

    low_channels, high_channels  the encoder's; out_channels is C (ELN: 1)
    width         channels of ASPP and decoder, 256 in DeepLabv3+
    aspp_dropout  dropout behind the ASPP
    proj          whether there is a projector, EMBEDDING channels"""

    def __init__(self, low_channels, high_channels, out_channels, width=256, aspp_dropout=0.1, proj=False):
        super().__init__()
        self.aspp = ASPP(high_channels, width, aspp_dropout)
        self.low = ConvBNReLU(low_channels, 48, 1)
        self.fuse = nn.Sequential(
            ConvBNReLU(width + 48, width, 3), nn.Dropout(0.5),
            ConvBNReLU(width, width, 3), nn.Dropout(0.1),
        )
        self.seg = head(width, out_channels)
        self.proj = head(width, EMBEDDING) if proj else None

    def forward(self, low, high, size, embed=False):
        """Logits at `size` (H, W), and with embed=True features.

        low (B, low_channels, stride 4), high (B, high_channels, stride 16)
        Returns logits (B, out_channels, H, W), at least float32; feature (B, EMBEDDING, stride 4) or None."""
        x = F.interpolate(self.aspp(high), size=low.shape[2:], mode="bilinear", align_corners=False)
        x = self.fuse(torch.cat([x, self.low(low)], dim=1))  # (B, width, stride 4)
        logits = self.seg(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits, self.proj(x) if embed else None


class DeepLabV3Plus(nn.Module):
    """The main segmentation network D(E(X)), student and teacher. Arguments as in Encoder and Decoder."""

    def __init__(self, num_classes, backbone="resnet50", weights="none", width=256):
        super().__init__()
        self.encoder = Encoder(backbone, weights)
        self.decoder = Decoder(*self.encoder.channels, num_classes, width, proj=True)

    def forward(self, image, embed=False):
        """X (B, 3, H, W), ImageNet-normalised -> logits, feature, encoded.

        logits (B, C, H, W); feature (B, 128, stride 4), or None without embed; encoded: the encoder's two"""
        encoded = self.encoder(image)
        return *self.decoder(*encoded, image.shape[2:], embed), encoded
