"""Equations (1) to (11) of "Semi-supervised Semantic Segmentation with Error Localization
Network".

Search for "Eq. (k)" to find equation k. Each function needs torch alone, keeps no state, and
may be copied on its own, together with the functions that its docstring lists under "Calls".

    B images, C classes, H W image size (of volumes D H W, and so on: any number of axes),
    K auxiliary decoders, N anchors, M keys, D channels. B^k, M^k and D^k are the paper's: ELN's
    output, its target, a decoder.
    logits are scores before the softmax: where the paper writes log P, the code takes the
    log_softmax of the logits. A label of `ignore_index` (255) is void: the pixel has no class
    and is not counted. The k in alpha^k, P^k and so on is an index, not a power.

Conventions
    The paper sums over pixels; here it is the mean over the image's non-void pixels, in Eq. (9)
    over all pixels. Sums over images are means over the batch. So every loss but Eq. (10), and
    (11) with it, is a mean over images of a value that depends on one image alone.
    Indicators and ratios that depend on the data (Eq. 3, 5) are constants without a gradient.
    A loss that an indicator switches off becomes 0 and is not left out, so that every parameter
    stays in the graph.
    Half precision is promoted to float32; float64 stays float64. Every loss of at least one
    image has a graph (but Eq. (3) without decoders), also where nothing is counted.
"""

import torch
import torch.nn.functional as F


def cross_entropy(logits, label, ignore_index=255):
    """Pixel-wise cross-entropy of each image.  Eq. (1)

        L_ce(P, Y) = - sum_i Y_i . log P_i    (here: the mean over the image's non-void pixels)

    logits  (B, C, H, W) float
    label   (B, H, W)    int64, 0 .. C-1 or ignore_index
    Returns (B,), at least float32; an image without a counted pixel gives 0.
    Raises IndexError (on a GPU: a device assertion) for a label that is neither a class nor
    ignore_index.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none")
    counted = (label != ignore_index).flatten(1).sum(dim=1).to(loss.dtype)  # (B,)
    return loss.flatten(1).sum(dim=1) / counted.clamp(min=1)


def supervised_loss(logits, label, ignore_index=255):
    """Cross-entropy of the main network on labelled images.  Eq. (2)
    Calls: cross_entropy

        L_sup = 1/|D_L| sum_X L_ce(P, Y)

    logits  (B, C, H, W) float
    label   (B, H, W)    int64, 0 .. C-1 or ignore_index
    Returns a scalar: the mean over images. Raises as Eq. (1).
    """
    return cross_entropy(logits, label, ignore_index).mean()


def auxiliary_loss(aux_logits, logits, label, alphas, ignore_index=255):
    """Cross-entropy of the auxiliary decoders, which stay worse than the main one.  Eq. (3)
    Calls: cross_entropy

        L_aux = 1/|D_L| sum_X sum_k 1{L_ce(P^k, Y) > alpha^k L_ce(P, Y)} L_ce(P^k, Y)

    aux_logits  list of K (B, C, H, W) float: P^k, made from detached encoder features
    logits      (B, C, H, W) float: P of the main decoder, a constant here (no gradient)
    label       (B, H, W) int64, 0 .. C-1 or ignore_index
    alphas      K numbers
    Returns a scalar: the sum over k of means over images; K = 0 gives a constant 0.
    Raises ValueError unless there is one alpha for each decoder, and as Eq. (1).
    """
    L_ce = cross_entropy(logits.detach(), label, ignore_index)  # (B,)
    total = torch.zeros_like(L_ce)
    for logits_k, alpha_k in zip(aux_logits, alphas, strict=True):
        L_ce_k = cross_entropy(logits_k, label, ignore_index)  # (B,)
        indicator = (L_ce_k > alpha_k * L_ce).to(L_ce.dtype)  # (B,): one per image, no gradient
        total = total + indicator * L_ce_k
    return total.mean()


def correctness(logits, label, ignore_index=255):
    """ELN's target: where is the prediction right?  M^k of Eq. (4)

        M_i = 1 if argmax_c P_i = Y_i, else 0

    logits  (B, C, H, W) float
    label   (B, H, W)    int64, 0 .. C-1 or ignore_index
    Returns (B, H, W) int64: 1 right, 0 wrong, ignore_index where the label is void.
    Raises ValueError if ignore_index is 0 or 1, which mean wrong and right here.
    """
    if ignore_index in (0, 1):
        raise ValueError(f"ignore_index {ignore_index} would mean wrong or right")
    correct = (logits.argmax(dim=1) == label).long()
    return correct.masked_fill(label == ignore_index, ignore_index)


def weighted_cross_entropy(valid_logit, correct, reweight=True):
    """Binary cross-entropy of each image, in which all wrong pixels together weigh as much as
    all right ones together.  Eq. (5)

        L_wce(B, M) = - sum_i (1{M_i = 0} r log(1 - B_i) + 1{M_i = 1} log B_i)
        r = (pixels with M = 1) / (pixels with M = 0)      (here: the mean over non-void pixels)

    valid_logit  (B, H, W) float: above 0, a sigmoid above 0.5, ELN takes the pixel for right
    correct      (B, H, W) int64: M, 1 right, 0 wrong, anything else void
    reweight     False sets r = 1: the plain L_ce(B, M) of Eq. (4)
    Returns (B,), at least float32. As printed, an image whose every pixel is wrong has r = 0
    and gives 0; without a wrong pixel the loss is the plain mean; without a counted pixel it
    is 0.
    """
    valid_logit = valid_logit.to(torch.promote_types(valid_logit.dtype, torch.float32))
    valid_logit = valid_logit.flatten(1)  # (B, pixels)
    right = (correct == 1).flatten(1).to(valid_logit.dtype)  # (B, pixels): 1{M_i = 1}
    wrong = (correct == 0).flatten(1).to(valid_logit.dtype)  # (B, pixels): 1{M_i = 0}
    n_right = right.sum(dim=1)  # (B,)
    n_wrong = wrong.sum(dim=1)  # (B,)
    r = torch.ones_like(n_right)
    if reweight:
        r = n_right / n_wrong.clamp(min=1)
    loss = F.binary_cross_entropy_with_logits(valid_logit, right, reduction="none")
    weight = r[:, None] * wrong + right  # void: 0
    return (weight * loss).sum(dim=1) / (n_right + n_wrong).clamp(min=1)


def eln_loss(valid_logits, predictions, label, reweight=True, ignore_index=255):
    """ELN learns to localize errors.  Eq. (6), or with reweight=False Eq. (4)
    Calls: correctness, weighted_cross_entropy

        L_ELN = 1/(|D_L| (K+1)) sum_X sum_{k=0..K} L_wce(B^k, M^k)

    valid_logits  list of K+1 (B, H, W) float: ELN's outputs B^k, before the sigmoid
    predictions   list of K+1 (B, C, H, W) float: P^k, the main decoder's first; only their
                  argmax counts, and no gradient reaches them
    label         (B, H, W) int64, 0 .. C-1 or ignore_index
    Returns a scalar: the mean over the images and the K+1 predictions.
    Raises ValueError unless the lists are of equal length, RuntimeError if they are empty.
    """
    terms = []
    for valid_logit, logits in zip(valid_logits, predictions, strict=True):
        correct = correctness(logits, label, ignore_index)  # M^k
        terms.append(weighted_cross_entropy(valid_logit, correct, reweight))
    return torch.stack(terms).mean()  # over (K+1, B)


def labeled_loss(sup, aux, eln):
    """The loss of labelled images, the sum of three scalars.  Eq. (7)

        L_labeled = L_sup + L_aux + L_ELN
    """
    return sup + aux + eln


def ema_update(teacher, student, beta=0.995):
    """The teacher follows the student as an exponential moving average, in place.  Eq. (8)

        theta~_t = beta theta~_(t-1) + (1 - beta) theta_t

    teacher, student  two nn.Module of the same structure; the teacher is at least float32
    beta              in [0, 1]
    Weights and BatchNorm's running mean and variance are averaged; BatchNorm's integer count of
    batches is left alone, as no output depends on it. Returns None.
    Raises ValueError, before anything is changed, if the two differ in structure, or if the
    teacher has half precision, in which small steps are lost.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    pairs += zip(teacher.buffers(), student.buffers(), strict=True)
    for theta_teacher, theta in pairs:
        if theta_teacher.shape != theta.shape:
            raise ValueError("teacher and student have tensors of different shapes")
        if theta_teacher.dtype in (torch.float16, torch.bfloat16):
            raise ValueError("keep the teacher in float32: half precision loses small steps")
    with torch.no_grad():
        for theta_teacher, theta in pairs:
            if theta_teacher.is_floating_point():  # not BatchNorm's count
                theta_teacher.mul_(beta).add_(theta, alpha=1 - beta)


def pseudo_label_loss(logits, pseudo_label, valid):
    """Self-training on the pixels that ELN accepts.  Eq. (9)

        L_pseudo = - 1/|D_U| sum_X sum_i  round(B~_i) Y^_i . log P^a_i

    logits        (B, C, H, W) float: the student's output for the perturbed image A.X
    pseudo_label  (B, H, W)    int64, 0 .. C-1: argmax of the teacher's output for X
    valid         (B, H, W)    bool: round(B~), ELN believes the pseudo label
    Returns a scalar: the mean over ALL H*W pixels, so that rejecting more makes it smaller; if
    no pixel is valid it is 0.
    Raises ValueError unless valid is bool and has the pseudo label's shape, and IndexError (on
    a GPU: a device assertion) for a pseudo label of 255, which is no class.
    """
    if valid.dtype != torch.bool or valid.shape != pseudo_label.shape:
        raise ValueError("valid must be bool and of the shape of pseudo_label")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, pseudo_label, reduction="none")  # (B, H, W)
    return loss.masked_fill(~valid, 0).mean()


def contrastive_loss(anchor, key, anchor_label, key_label, tau=0.5, ignore_index=255):
    """Pixels of one pseudo label attract each other, those of others repel.  Eq. (10)

        L_contra = - 1/|V| sum_{i in V} sum_{j in Omega_p}
                       log( d(f_i, f~_j) / (d(f_i, f~_j) + sum_{k in Omega_n} d(f_i, f~_k)) )
        d(a, b) = exp(cos(a, b) / tau)      (here: the mean over j in Omega_p, not their sum)

    anchor        (N, D) float: the student's features f, of any length (normalised inside)
    key           (M, D) float: the teacher's features f~, constants (no gradient)
    anchor_label  (N,)   int64: pseudo labels; ignore_index = not in V
    key_label     (M,)   int64: the same; ignore_index = neither positive nor negative
    tau           temperature > 0
    Returns a scalar: the mean over the anchors in V of the mean over each one's positives. If
    anchors and keys are the same pixels, f~_i is among the positives of i. An anchor without a
    positive, or without a negative, gives 0 and still counts in |V|; an empty V gives 0. The
    anchors may be split into parts: if each part gets all keys, the loss of all is the mean of
    the parts' losses, weighted by their numbers of anchors in V.
    Under torch.compile the loop over classes breaks the graph; the values stay right.
    Raises ValueError for other shapes, and for a negative label that is not ignore_index.
    """
    if anchor.ndim != 2 or anchor_label.shape != anchor.shape[:1]:
        raise ValueError("anchor must be (N, D) and anchor_label (N,)")
    if key.ndim != 2 or key_label.shape != key.shape[:1]:
        raise ValueError("key must be (M, D) and key_label (M,)")
    labels = torch.cat([anchor_label, key_label])
    if ((labels < 0) & (labels != ignore_index)).any():
        raise ValueError("a label is negative and not ignore_index")
    dtype = torch.promote_types(anchor.dtype, torch.float32)
    with torch.autocast(anchor.device.type, enabled=False):  # else products are half precision
        f = F.normalize(anchor.to(dtype), dim=1) / tau  # so that f @ f~.T = cos / tau = log d
        f_teacher = F.normalize(key.detach().to(dtype), dim=1)
        loss = (0 * f).sum()  # has a graph, also where no anchor has a positive
        in_V = anchor_label != ignore_index
        for c in anchor_label[in_V].unique():  # Omega_p and Omega_n depend on i's class alone
            is_negative = (key_label != c) & (key_label != ignore_index)
            f_c = f[anchor_label == c]  # (n, D): the anchors of class c
            positives = f_teacher[key_label == c]  # (p, D): Omega_p of each of them
            negatives = f_teacher[is_negative]  # (q, D): Omega_n of each of them
            log_d = f_c @ positives.T  # (n, p): log d(f_i, f~_j)
            log_d_n = f_c @ negatives.T  # (n, q): log d(f_i, f~_k)
            log_s = log_d_n.logsumexp(dim=1, keepdim=True)  # (n, 1): s is the sum over Omega_n
            log_ratio = F.logsigmoid(log_d - log_s)  # (n, p): log(d / (d + s))
            loss = loss - log_ratio.sum() / max(len(positives), 1)
        return loss / in_V.sum().clamp(min=1)


def unlabeled_loss(pseudo, contra):
    """The loss of unlabelled images, the sum of two scalars.  Eq. (11)

        L_unlabeled = L_pseudo + L_contra
    """
    return pseudo + contra
