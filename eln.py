"""The error localization network (Sec. 3.1, 4.1): which pixels of a prediction are likely to be wrong?

It reads the image X, the prediction P and the prediction's entropy E, and gives one logit a pixel: above 0 (a
sigmoid above 0.5) it believes the prediction. Encoder and decoder are those of model.py. Its rival, the s-ECN
of Sec. 4.3, is the same network with C outputs, the corrected prediction.
"""

import torch
from torch import nn

from model import Decoder, Encoder


def eln_input(image, logits):
    """ELN's input, X + P + E channel by channel (Sec. 3.1).

    image   (B, 3, H, W) float, ImageNet-normalised
    logits  (B, C, H, W) float: the judged prediction before its softmax; detached here
    Returns (B, 3 + C + 1, H, W): X, probabilities P in [0, 1], pixel-wise entropy E = - sum_c P_c log P_c in
    nats, in [0, log C].
    """
    log_P = logits.detach().log_softmax(dim=1)
    P = log_P.exp()
    E = -(P * log_P).sum(dim=1, keepdim=True)
    return torch.cat([image.to(P.dtype), P, E], dim=1)


class ErrorLocalizationNetwork(nn.Module):
    """ELN, and with out_channels = C the s-ECN of Sec. 4.3, which corrects the prediction instead.

    num_classes   C of the judged predictions
    backbone      of its own encoder, ResNet-34 in the paper; weights as in model.Encoder
    width         as in model.Decoder
    out_channels  1: error localization; C: error correction
    """

    def __init__(self, num_classes, backbone="resnet34", weights="none", width=256, out_channels=1):
        super().__init__()
        self.encoder = Encoder(backbone, weights)
        rgb = self.encoder.resnet.conv1
        conv1 = nn.Conv2d(3 + num_classes + 1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        with torch.no_grad():
            conv1.weight[:, :3] = rgb.weight  # the ImageNet filters for X; those for P and E begin fresh
        self.encoder.resnet.conv1 = conv1
        self.decoder = Decoder(
            self.encoder.low_channels, self.encoder.high_channels, out_channels, width, aspp_dropout=0.5
        )

    def forward(self, x):
        """x (B, 3 + C + 1, H, W) of eln_input -> valid_logit (B, H, W); (B, C, H, W) with C outputs."""
        low, high = self.encoder(x)
        out, _ = self.decoder(low, high, x.shape[2:])
        return out.squeeze(1)


def rejected(output, logits):
    """Which pixels of a prediction are taken for wrong.

    output  (B, H, W) float, ELN's valid_logit: those of at most 0; or (B, C, H, W) float, s-ECN's correction:
            those whose class it changes
    logits  (B, C, H, W) float: the judged prediction
    Returns (B, H, W) bool.
    """
    return output <= 0 if output.ndim == 3 else output.argmax(dim=1) != logits.argmax(dim=1)


def doubt(output, logits):
    """How much each pixel of a prediction is doubted: minus the logit of its being right, (B, H, W) float.

    output, logits as in rejected; for the s-ECN "right" means the predicted class, so that a pixel which it
    does not correct may still be doubted more than another.
    """
    if output.ndim == 3:
        return -output
    P = output.double().softmax(dim=1).gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)
    return -torch.logit(P, eps=1e-12)
