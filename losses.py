"""Equations (1) to (11) of "Semi-supervised Semantic Segmentation with Error Localization Network" (ELN).

Each function is one equation. It needs torch alone, keeps no state, and may be copied on its own, together
with the functions that its docstring lists under "Calls".

    B images, C classes, H W image size, K auxiliary decoders, N anchors, M keys, D embedding size.
    logits are scores before the softmax: where the paper writes log P, the code takes log_softmax(logits).
    A label of `ignore_index` (255) is void: it is neither a class nor counted. ^k is an index, no power.

Conventions
    Sums over pixels are means over the image's counted pixels (Eq. 9: all of them), sums over images are
    means over the batch. So every loss but Eq. (10) is a mean of what depends on one image alone.
    Indicators and ratios that depend on the data (Eq. 3, 5) are constants without a gradient. They multiply
    by 0 rather than leave a term out, so that every parameter stays in the graph.
    Half precision is promoted to float32; float64 stays float64. Every loss of a batch of at least one image
    carries a graph (K = 0 of Eq. (3) apart), also where nothing is counted, and is not NaN for usual logits.
"""

import torch
import torch.nn.functional as F


def cross_entropy(logits, label, ignore_index=255):
    """Pixel-wise cross-entropy of each image.  Eq. (1)

        L_ce(P, Y) = - sum_i Y_i . log P_i        (here: the mean over the image's non-void pixels)

    logits  (B, C, H, W) float
    label   (B, H, W)    int64, 0 .. C-1 or ignore_index
    Returns (B,), at least float32; an image without a counted pixel gives 0.
    Raises IndexError (on a GPU: a device assertion) for a label that is neither a class nor ignore_index."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none")  # (B, H, W)
    counted = (label != ignore_index).sum(dim=(1, 2)).to(loss.dtype)  # (B,)
    return loss.sum(dim=(1, 2)) / counted.clamp(min=1)


def supervised_loss(logits, label, ignore_index=255):
    """Cross-entropy of the main network on labelled images.  Eq. (2).  Calls: cross_entropy

        L_sup = 1/|D_L| sum_X L_ce(P, Y)

    logits  (B, C, H, W) float; label (B, H, W) int64, 0 .. C-1 or ignore_index
    Returns a scalar: the mean over images. Raises as Eq. (1)."""
    return cross_entropy(logits, label, ignore_index).mean()


def auxiliary_loss(aux_logits, logits, label, alphas, ignore_index=255):
    """Cross-entropy of the auxiliary decoders, down to alpha^k times the main decoder's.  Eq. (3).
    Calls: cross_entropy

        L_aux = 1/|D_L| sum_X sum_k 1{L_ce(P^k, Y) > alpha^k L_ce(P, Y)} L_ce(P^k, Y)

    aux_logits  list of K (B, C, H, W) float: P^k, made from detached encoder features
    logits      (B, C, H, W) float: P of the main decoder, a constant here (no gradient)
    label       (B, H, W) int64, 0 .. C-1 or ignore_index
    alphas      K numbers
    Returns a scalar: the sum over k of means over images; K = 0 gives a constant 0.
    Raises ValueError unless there is one alpha per decoder, and as Eq. (1)."""
    main = cross_entropy(logits.detach(), label, ignore_index)  # (B,)
    total = torch.zeros_like(main)
    for prediction, alpha in zip(aux_logits, alphas, strict=True):
        loss = cross_entropy(prediction, label, ignore_index)  # (B,)
        total = total + (loss.detach() > alpha * main) * loss
    return total.mean()


def correctness(logits, label, ignore_index=255):
    """ELN's target: where is the prediction right?  M^k of Eq. (4)

        M_i = 1 if argmax_c P_i = Y_i, else 0

    logits  (B, C, H, W) float; label (B, H, W) int64, 0 .. C-1 or ignore_index
    Returns (B, H, W) int64: 1 right, 0 wrong, ignore_index where the label is void.
    Raises ValueError if ignore_index is 0 or 1, which mean wrong and right here."""
    if ignore_index in (0, 1):
        raise ValueError(f"ignore_index {ignore_index} would mark void pixels as wrong or right")
    correct = (logits.argmax(dim=1) == label).long()
    return correct.masked_fill(label == ignore_index, ignore_index)


def weighted_cross_entropy(valid_logit, correct, reweight=True):
    """Binary cross-entropy of each image, in which wrong pixels weigh as much as right ones.  Eq. (5)

        L_wce(B, M) = - sum_i (1{M_i = 0} r log(1 - B_i) + 1{M_i = 1} log B_i)
                  r = (pixels with M = 1) / (pixels with M = 0)      (here: the mean over the non-void pixels)

    valid_logit  (B, H, W) float: sigmoid(valid_logit) is the probability that the prediction is right
    correct      (B, H, W) int64: M, 1 right, 0 wrong, anything else void
    reweight     False sets r = 1: the plain L_ce(B, M) of Eq. (4)
    Returns (B,), at least float32. As printed, an image whose every pixel is wrong has r = 0 and gives 0;
    without a wrong pixel the loss is the plain mean; without a counted pixel it is 0."""
    valid_logit = valid_logit.to(torch.promote_types(valid_logit.dtype, torch.float32))
    right = (correct == 1).to(valid_logit.dtype)
    wrong = (correct == 0).to(valid_logit.dtype)
    loss = F.binary_cross_entropy_with_logits(valid_logit, right, reduction="none")  # (B, H, W)
    n_right, n_wrong = right.sum(dim=(1, 2)), wrong.sum(dim=(1, 2))  # (B,)
    r = n_right / n_wrong.clamp(min=1) if reweight else torch.ones_like(n_right)
    weight = right + wrong * r[:, None, None]  # void: 0
    return (weight * loss).sum(dim=(1, 2)) / (n_right + n_wrong).clamp(min=1)


def eln_loss(valid_logits, predictions, label, reweight=True, ignore_index=255):
    """ELN learns to localize the errors of K+1 predictions.  Eq. (6), and Eq. (4) with reweight=False.
    Calls: correctness, weighted_cross_entropy

        L_ELN = 1/(|D_L| (K+1)) sum_X sum_{k=0..K} L_wce(B^k, M^k)

    valid_logits  list of K+1 (B, H, W) float: ELN's outputs B^k, before the sigmoid
    predictions   list of K+1 (B, C, H, W) float: P^k, the main decoder's first; only their argmax counts
    label         (B, H, W) int64, 0 .. C-1 or ignore_index
    Returns a scalar: the mean over the images and the K+1 predictions.
    Raises ValueError unless the lists are of equal length, RuntimeError if they are empty."""
    terms = [
        weighted_cross_entropy(B_k, correctness(P_k, label, ignore_index), reweight)
        for B_k, P_k in zip(valid_logits, predictions, strict=True)
    ]
    return torch.stack(terms).mean()  # over (K+1, B)


def labeled_loss(sup, aux, eln):
    """The loss of labelled images, a scalar from three.  Eq. (7):  L_labeled = L_sup + L_aux + L_ELN"""
    return sup + aux + eln


@torch.no_grad()
def ema_update(teacher, student, beta=0.995):
    """The teacher follows the student as an exponential moving average, in place.  Eq. (8)

        theta~_t = beta theta~_(t-1) + (1 - beta) theta_t

    teacher, student  two nn.Module of the same structure; beta in [0, 1]
    Weights and BatchNorm's running mean and variance are averaged; its integer count is left alone, unread.
    Returns None. Raises RuntimeError if the two differ in structure."""
    nets = [(*network.parameters(), *network.buffers()) for network in (teacher, student)]
    averages, theta = ([entry for entry in net if entry.is_floating_point()] for net in nets)
    torch._foreach_lerp_(averages, theta, 1 - beta)  # one call: hundreds of small ones keep a GPU waiting


def pseudo_label_loss(logits, pseudo_label, valid):
    """Self-training on the pixels that ELN accepts.  Eq. (9)

        L_pseudo = - 1/|D_U| sum_X sum_i  round(B~_i) Y^_i . log P^a_i

    logits        (B, C, H, W) float: the student's output for the perturbed image A.X
    pseudo_label  (B, H, W)    int64, 0 .. C-1: argmax of the teacher's output for X
    valid         (B, H, W)    bool: round(B~), ELN believes the pseudo label
    Returns a scalar: the mean over ALL H*W pixels, so that rejecting more makes it smaller; none gives 0.
    Raises IndexError (on a GPU: a device assertion) for a pseudo label that is no class, void included."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (valid * F.cross_entropy(logits, pseudo_label, reduction="none")).mean()


def contrastive_loss(anchor, key, anchor_label, key_label, tau=0.5, ignore_index=255):
    """Pixel-wise contrast over the whole batch: the same pseudo label attracts, another repels.  Eq. (10)

        L_contra = - 1/|V| sum_{i in V} 1/|Omega_p| sum_{j in Omega_p}
                       log( d(f_i, f~_j) / (d(f_i, f~_j) + sum_{k in Omega_n} d(f_i, f~_k)) )
        d(a, b) = exp(cos(a, b) / tau)

    anchor        (N, D) float: the student's features f, of any length (normalised inside)
    key           (M, D) float: the teacher's features f~, constants (no gradient)
    anchor_label  (N,)   int64: pseudo labels; ignore_index = not in V
    key_label     (M,)   int64: the same; ignore_index = neither positive nor negative for any anchor
    tau           temperature > 0
    Returns a scalar: the mean over the anchors in V of the mean over each one's positives, i's own f~_i among
    them (the paper prints their sum). An anchor without a positive gives 0 and still counts in |V|; an empty
    V gives 0. Given all keys, parts of the anchors, weighted by their share of V, add up to the whole."""
    dtype = torch.promote_types(anchor.dtype, torch.float32)
    labels = torch.cat([anchor_label, key_label]).cpu()  # a GPU is waited for here once, not in the loop
    classes = labels.unique().tolist()
    sizes = [[int((part == c).sum()) for c in classes] for part in labels.split([len(anchor), len(key)])]
    with torch.autocast(anchor.device.type, enabled=False):  # else the products are in half precision again
        f = F.normalize(anchor.to(dtype), dim=1) / tau  # f @ f~ = cos / tau = log d
        f_teacher = F.normalize(key.detach().to(dtype), dim=1)
        loss = 0 * f.sum()  # the graph, also where no anchor has a positive
        anchors = dict(zip(classes, f[anchor_label.argsort()].split(sizes[0])))  # {class: (n, D)}
        keys = dict(zip(classes, f_teacher[key_label.argsort()].split(sizes[1])))  # {class: (p, D)}
        counted = [c for c in classes if c != ignore_index]
        for c in (c for c in counted if len(anchors[c])):
            negatives = torch.cat([f_teacher[:0], *(keys[other] for other in counted if other != c)])
            log_d_p = anchors[c] @ keys[c].T  # (n, p): keys[c] are Omega_p of each of the n anchors
            log_d_n = anchors[c] @ negatives.T  # (n, q): Omega_n
            # log d/(d + s) = logsigmoid(log d - log s), where s sums the negatives
            log_ratio = F.logsigmoid(log_d_p - log_d_n.logsumexp(dim=1, keepdim=True))
            loss = loss - log_ratio.sum() / max(len(keys[c]), 1)
        return loss / max(sum(len(anchors[c]) for c in counted), 1)


def unlabeled_loss(pseudo, contra):
    """The loss of unlabelled images, a scalar from two.  Eq. (11):  L_unlabeled = L_pseudo + L_contra"""
    return pseudo + contra
