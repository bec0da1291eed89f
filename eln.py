"""The error localization network (Sec. 3.1, 4.1): which pixels of a prediction may be wrong?

It reads the image X, the prediction P and its entropy E, and gives one logit a pixel. Above 0,
where its sigmoid is above 0.5, it believes the prediction. Encoder and decoder are those of
model.py. Its rival of Sec. 4.3, the s-ECN, is the same network with C outputs: a corrected
prediction.
"""

import torch
from torch import nn

from losses import supervised_loss
from model import Decoder, Encoder


def eln_input(image, logits):
    """ELN's input, X + P + E channel by channel (Sec. 3.1).

    image   (B, 3, H, W) float, ImageNet-normalised
    logits  (B, C, H, W) float: the judged prediction before its softmax; detached here
    Returns (B, 3 + C + 1, H, W): X, the probabilities P in [0, 1], and the pixel-wise entropy
    E = - sum_c P_c log P_c in nats, in [0, log C].
    """
    log_P = logits.detach().log_softmax(dim=1)
    P = log_P.exp()
    E = -(P * log_P).sum(dim=1, keepdim=True)  # (B, 1, H, W)
    return torch.cat([image.to(P.dtype), P, E], dim=1)


class ErrorLocalizationNetwork(nn.Module):
    """ELN, and with out_channels = C the s-ECN, which corrects the prediction instead.

    num_classes   C of the judged predictions
    backbone      of its own encoder, ResNet-34 in the paper
    weights       as in model.Encoder
    width         as in model.Decoder
    out_channels  1: error localization; C: error correction
    """

    def __init__(
        self, num_classes, backbone="resnet34", weights="none", width=256, out_channels=1
    ):
        super().__init__()
        self.encoder = Encoder(backbone, weights)
        in_channels = 3 + num_classes + 1  # X, P, E
        conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        with torch.no_grad():  # X keeps the backbone's filters; those for P and E are new
            conv1.weight[:, :3] = self.encoder.resnet.conv1.weight
        self.encoder.resnet.conv1 = conv1
        # The dropout is the released one.
        self.decoder = Decoder(*self.encoder.channels, out_channels, width, aspp_dropout=0.5)

    def forward(self, x):
        """x (B, 3 + C + 1, H, W) of eln_input -> valid_logit (B, H, W); s-ECN: (B, C, H, W)."""
        low, high = self.encoder(x)
        output, _ = self.decoder(low, high, x.shape[2:])
        return output.squeeze(1)


class AuxiliaryNetworks(nn.Module):
    """What Sec. 3.1 trains beside the main network: K auxiliary decoders D^k, and ELN.

    num_classes  C
    encoder      the main network's, for its numbers of channels
    args         alphas (K of them), corrector ("eln", or "ecn" for the s-ECN), eln_backbone,
                 eln_weights, width
    """

    def __init__(self, num_classes, encoder, args):
        super().__init__()
        self.decoders = nn.ModuleList()
        for _ in args.alphas:
            self.decoders.append(Decoder(*encoder.channels, num_classes, args.width))
        self.eln = ErrorLocalizationNetwork(
            num_classes,
            args.eln_backbone,
            args.eln_weights,
            args.width,
            out_channels=1 if args.corrector == "eln" else num_classes,
        )

    def forward(self, image, logits, low, high):
        """The auxiliary decoders predict, and ELN judges all K+1 predictions in one batch.

        image      (B, 3, H, W) float: X
        logits     (B, C, H, W) float: P of the main network for X
        low, high  its encoder's features of X
        Returns aux_logits, a list of K (B, C, H, W), and valid_logits, K+1 (B, H, W); with the
        s-ECN the latter are K+1 corrections (B, C, H, W).
        What is read is detached: the decoders' gradient does not reach the main network, and
        ELN's gradient reaches neither the main network nor the decoders.
        """
        aux_logits = []
        for decoder in self.decoders:
            logits_k, _ = decoder(low.detach(), high.detach(), image.shape[2:])  # P^k
            aux_logits.append(logits_k)
        judged = [eln_input(image, logits_k) for logits_k in (logits, *aux_logits)]
        valid_logits = self.eln(torch.cat(judged)).chunk(len(judged))  # B^0 .. B^K
        return aux_logits, valid_logits


# ---- The s-ECN (Sec. 4.3) ----


def ecn_loss(corrections, predictions, label):
    """The s-ECN's loss: cross-entropy of K+1 corrected predictions; arguments as of eln_loss.

    corrections  list of K+1 (B, C, H, W) float
    predictions  not needed
    label        (B, H, W) int64, 255 = void
    Returns a scalar: the mean over the corrections and the images.
    """
    terms = [supervised_loss(correction, label) for correction in corrections]
    return torch.stack(terms).mean()


def valid_logit_of(output, logits):
    """ELN's or the s-ECN's judgement of a prediction, as one number a pixel.

    output  (B, H, W) float of ELN: the judgement itself. (B, C, H, W) float of the s-ECN: what
            counts is its score of the predicted class less that of the best other class
    logits  (B, C, H, W) float: the judged prediction
    Returns (B, H, W) float: above 0 the prediction is taken for right.
    """
    if output.ndim == 3:
        return output
    predicted = logits.argmax(dim=1, keepdim=True)
    own = output.gather(1, predicted).squeeze(1)
    best_other = output.scatter(1, predicted, -torch.inf).amax(dim=1)
    return own - best_other
