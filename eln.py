"""The error localization network (Sec. 3.1, 4.1): which pixels of a prediction are likely to be wrong?

It reads the image X, the prediction P and the prediction's entropy E, and gives one logit a pixel: above 0 (a
sigmoid above 0.5) it believes the prediction. Encoder and decoder are those of model.py. Its rival, the s-ECN
of Sec. 4.3, is the same network with C outputs, the corrected prediction.
"""

import torch
from torch import nn

from losses import correctness, cross_entropy, supervised_loss
from model import Decoder, Encoder


def eln_input(image, logits):
    """ELN's input, X + P + E channel by channel (Sec. 3.1).

    image   (B, 3, H, W) float, ImageNet-normalised
    logits  (B, C, H, W) float: the judged prediction before its softmax; detached here
    Returns (B, 3 + C + 1, H, W): X, probabilities P in [0, 1], pixel-wise entropy E = - sum_c P_c log P_c in
    nats, in [0, log C]."""
    log_P = logits.detach().log_softmax(dim=1)
    P = log_P.exp()
    E = -(P * log_P).sum(dim=1, keepdim=True)
    return torch.cat([image.to(P.dtype), P, E], dim=1)


class ErrorLocalizationNetwork(nn.Module):
    """ELN, and with out_channels = C the s-ECN of Sec. 4.3, which corrects the prediction instead.

    num_classes   C of the judged predictions
    backbone      of its own encoder, ResNet-34 in the paper; weights as in model.Encoder
    width         as in model.Decoder
    out_channels  1: error localization; C: error correction"""

    def __init__(self, num_classes, backbone="resnet34", weights="none", width=256, out_channels=1):
        super().__init__()
        self.encoder = Encoder(backbone, weights)
        rgb = self.encoder.resnet.conv1
        conv1 = nn.Conv2d(3 + num_classes + 1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        with torch.no_grad():
            conv1.weight[:, :3] = rgb.weight  # the ImageNet filters for X; those for P and E begin fresh
        self.encoder.resnet.conv1 = conv1
        self.decoder = Decoder(*self.encoder.channels, out_channels, width, aspp_dropout=0.5)

    def forward(self, x):
        """x (B, 3 + C + 1, H, W) of eln_input -> valid_logit (B, H, W); (B, C, H, W) with C outputs."""
        low, high = self.encoder(x)
        out, _ = self.decoder(low, high, x.shape[2:])
        return out.squeeze(1)


class AuxiliaryNetworks(nn.Module):
    """What Sec. 3.1 trains beside the main network: K auxiliary decoders D^k, and ELN on all K+1 predictions.

    num_classes C; encoder: the main network's, for its numbers of channels
    args  alphas (K of them), corrector ("eln", or "ecn": the s-ECN), eln_backbone, eln_weights, width"""

    def __init__(self, num_classes, encoder, args):
        super().__init__()
        decoders = (Decoder(*encoder.channels, num_classes, args.width) for _ in args.alphas)
        self.decoders = nn.ModuleList(decoders)
        arguments = num_classes, args.eln_backbone, args.eln_weights, args.width
        self.eln = ErrorLocalizationNetwork(*arguments, num_classes if args.corrector == "ecn" else 1)

    def forward(self, image, logits, low, high):
        """X (B, 3, H, W), and the main network's logits, low, high for it -> aux_logits, valid_logits.

        Lists of K (B, C, H, W) and K+1 (B, H, W); with the s-ECN the latter are K+1 corrections (B, C, H, W).
        No gradient reaches the main network, nor the D^k from ELN: what is read is detached."""
        size = image.shape[2:]
        aux_logits = [decoder(low.detach(), high.detach(), size)[0] for decoder in self.decoders]  # P^k
        judged = torch.cat([eln_input(image, P) for P in (logits, *aux_logits)])  # ((K+1) B, 3 + C + 1, H, W)
        return aux_logits, self.eln(judged).chunk(1 + len(aux_logits))  # P^k, B^k


def ecn_loss(corrections, predictions, label):
    """The s-ECN's loss (Sec. 4.3), called as Eq. (6) is: cross-entropy of the K+1 corrected predictions.

    corrections  list of K+1 (B, C, H, W) float; predictions are not needed; label (B, H, W) int64, 255 = void
    Returns a scalar: the mean over them and the images."""
    return torch.stack([supervised_loss(correction, label) for correction in corrections]).mean()


def margin(output, logits):
    """How firmly each pixel of a prediction is taken for right, (B, H, W) float: above 0 it is accepted.

    output  (B, H, W) float: ELN's valid_logit, the margin itself; or (B, C, H, W) float, the s-ECN's: its
            score of the predicted class less that of the best other one
    logits  (B, C, H, W) float: the judged prediction"""
    if output.ndim == 3:
        return output
    predicted = logits.argmax(dim=1, keepdim=True)
    best_other = output.scatter(1, predicted, -torch.inf).amax(dim=1)
    return output.gather(1, predicted).squeeze(1) - best_other


@torch.no_grad()
def diagnosis(logits, aux_logits, valid_logits, label, world):
    """What ELN hangs on, over the labelled batch of all processes: numbers for the log of training.

    ce_k/ce_0  mean cross-entropy of decoder k over the main one's; Eq. (3) compares the two image by image
    wrong_k    share of wrong pixels that decoder k gives ELN (0: the main one)
    eln_precision, eln_recall  of ELN's (or the s-ECN's) "wrong" among the pixels of all K+1 predictions"""
    sums = torch.zeros(len(valid_logits), 5, dtype=torch.float64, device=label.device)
    for k, (P, B) in enumerate(zip([logits, *aux_logits], valid_logits)):
        known, wrong = label != 255, correctness(P, label) == 0
        flagged = (margin(B, P) <= 0) & known
        counts = known, wrong, flagged, flagged & wrong
        sums[k] = torch.stack([cross_entropy(P, label).sum(), *(pixels.sum() for pixels in counts)])
    if world > 1:
        torch.distributed.all_reduce(sums)
    ce, known, wrong, flagged, hits = sums.T.tolist()  # K+1 each
    row = {f"ce_{k}/ce_0": ce[k] / max(ce[0], 1e-12) for k in range(1, len(ce))}
    row.update({f"wrong_{k}": wrong[k] / max(known[k], 1) for k in range(len(ce))})
    ratios = {"eln_precision": sum(hits) / max(sum(flagged), 1), "eln_recall": sum(hits) / max(sum(wrong), 1)}
    return {**row, **ratios}
