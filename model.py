"""DeepLabv3+ with a ResNet backbone: the segmentation network of Sec. 4.1.

An encoder (torchvision's ResNet at output stride 16) and a decoder (ASPP, low-level branch, two
heads). eln.py makes the auxiliary decoders and ELN of the same parts. A map of stride 4 is
ceil(H/4) x ceil(W/4) large.
"""

import os
import warnings
import zipfile

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import Conv2dNormActivation as ConvBNReLU  # keeps the size; no bias

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")
EMBEDDING = 128  # D, the channels of the projector's output


class Encoder(nn.Module):
    """E: a torchvision ResNet without its classifier, at output stride 16.

    backbone  one of BACKBONES
    weights   "none", "imagenet" or a path, see load_backbone_weights
    """

    def __init__(self, backbone="resnet50", weights="none"):
        super().__init__()
        resnet = torchvision.models.get_model(backbone, weights=None)
        load_backbone_weights(resnet, backbone, weights)
        # layer4 keeps stride 16 and looks twice as far instead. torchvision's own switch for
        # this refuses ResNet-18 and 34, and leaves layer4's first 3x3 convolution undilated.
        for module in resnet.layer4.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = (2, 2)
                    module.padding = (2, 2)
        low_channels = resnet.fc.in_features // 8  # of layer1
        high_channels = resnet.fc.in_features  # of layer4
        self.channels = (low_channels, high_channels)
        del resnet.fc
        self.resnet = resnet

    def forward(self, x):
        """Features of two depths.

        x (B, 3, H, W) float
        Returns low (B, 64 or 256, stride 4) and high (B, 512 or 2048, stride 16).
        """
        r = self.resnet
        x = r.relu(r.bn1(r.conv1(x)))
        low = r.layer1(r.maxpool(x))
        high = r.layer4(r.layer3(r.layer2(low)))
        return low, high


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, three dilated 3x3 and an image-pooling branch."""

    def __init__(self, in_channels, width, dropout):
        super().__init__()
        self.branches = nn.ModuleList()
        self.branches.append(ConvBNReLU(in_channels, width, kernel_size=1))
        for rate in (6, 12, 18):
            self.branches.append(ConvBNReLU(in_channels, width, kernel_size=3, dilation=rate))
        self.image = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, width, kernel_size=1),
            nn.ReLU(),  # no BatchNorm before it: of one image it would see a single value
        )
        self.project = nn.Sequential(
            ConvBNReLU(5 * width, width, kernel_size=1),
            nn.Dropout(dropout),
        )

    def forward(self, high):
        """(B, in_channels, h, w) -> (B, width, h, w)."""
        outputs = [branch(high) for branch in self.branches]
        pooled = self.image(high)  # (B, width, 1, 1)
        outputs.append(pooled.expand(-1, -1, *high.shape[2:]))
        return self.project(torch.cat(outputs, dim=1))


def head(width, out_channels):
    """Seg and Proj of Sec. 4.1: two 1x1 convolutions and a ReLU between them."""
    return nn.Sequential(
        nn.Conv2d(width, width, kernel_size=1),
        nn.ReLU(),
        nn.Conv2d(width, out_channels, kernel_size=1),
    )


class Decoder(nn.Module):
    """D, each auxiliary D^k, and ELN's: ASPP, low-level branch, Seg; the main D has Proj too.

    low_channels, high_channels  the encoder's
    out_channels  C; for ELN 1
    width         channels of ASPP and decoder, 256 in DeepLabv3+
    aspp_dropout  probability of the dropout behind the ASPP
    proj          whether there is a projector; only the main decoder has one
    """

    def __init__(
        self, low_channels, high_channels, out_channels, width=256, aspp_dropout=0.1, proj=False
    ):
        super().__init__()
        self.aspp = ASPP(high_channels, width, aspp_dropout)
        self.low = ConvBNReLU(low_channels, 48, kernel_size=1)
        self.fuse = nn.Sequential(
            ConvBNReLU(width + 48, width, kernel_size=3),
            nn.Dropout(0.5),
            ConvBNReLU(width, width, kernel_size=3),
            nn.Dropout(0.1),
        )
        self.seg = head(width, out_channels)
        self.proj = None
        if proj:
            self.proj = head(width, EMBEDDING)

    def forward(self, low, high, size, embed=False):
        """Logits at `size` (H, W), and with embed=True the features of Eq. (10).

        low (B, low_channels, stride 4), high (B, high_channels, stride 16)
        Returns logits (B, out_channels, H, W), at least float32, and feature (B, EMBEDDING,
        stride 4), or None without embed.
        """
        x = resize_bilinear(self.aspp(high), low.shape[2:])
        x = self.fuse(torch.cat([x, self.low(low)], dim=1))  # (B, width, stride 4)
        logits = self.seg(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = resize_bilinear(logits, size)
        feature = None
        if embed:
            feature = self.proj(x)
        return logits, feature


def resize_bilinear(x, size):
    """(B, channels, h, w) -> (B, channels, H, W) for size (H, W)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class DeepLabV3Plus(nn.Module):
    """The main segmentation network D(E(X)): student and teacher.

    num_classes  C; backbone and weights as in Encoder, width as in Decoder
    """

    def __init__(self, num_classes, backbone="resnet50", weights="none", width=256):
        super().__init__()
        self.encoder = Encoder(backbone, weights)
        self.decoder = Decoder(*self.encoder.channels, num_classes, width, proj=True)

    def forward(self, image, embed=False):
        """P before its softmax, and what other networks need of it.

        image  (B, 3, H, W) float: X, ImageNet-normalised
        Returns logits (B, C, H, W); feature (B, EMBEDDING, stride 4), or None without embed;
        encoded, the encoder's (low, high).
        """
        low, high = self.encoder(image)
        logits, feature = self.decoder(low, high, image.shape[2:], embed)
        return logits, feature, (low, high)


# ---- Reading weights ----


class WeightsError(ValueError):
    """A backbone's weights cannot be had, or are another network's; the message says why."""


def load_backbone_weights(resnet, backbone, weights):
    """Fill a torchvision ResNet in place, strictly: each entry must be there and fit.

    resnet    the network with its classifier `fc`, which stays as it is
    backbone  one of BACKBONES
    weights   "none": nothing is done. "imagenet": torchvision's IMAGENET1K_V1, downloaded once.
              Else the path of a torchvision state dict of any floating-point type; `fc.*` and
              BatchNorm's counts of batches may be missing.
    Raises WeightsError if they cannot be had, or are not this network's.
    """
    if weights == "none":
        return
    imagenet = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
    source = imagenet.url if weights == "imagenet" else weights
    try:
        if weights == "imagenet":
            loaded = imagenet.get_state_dict(check_hash=True)
        else:
            loaded = load_tensors(weights)
        state = {}
        for name, value in resnet.state_dict().items():
            if name.startswith("fc.") or name.endswith("num_batches_tracked"):
                state[name] = value  # may be missing in the file
        for name, value in loaded.items():
            if not name.startswith("fc."):
                state[name] = value
        resnet.load_state_dict(state)
    except Exception as error:  # damaged bytes reach the readers as errors of many kinds
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"weights {source} cannot be used for {backbone} ({reason}); give the path of a "
            "torchvision state dict, or start from --weights none --eln-weights none"
        ) from None


def load_tensors(path):
    """What torch.save wrote to a file: tensors on the CPU and plain values; no code is run.

    Raises ValueError for what is no regular file, or where the file's checksums show damage,
    which torch.load ignores; and what torch.load raises.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                raise ValueError(f"{path} is damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.load warns of odd bytes before it fails
        return torch.load(path, map_location="cpu", weights_only=True)
