"""
Muon with Polar Express orthogonalisation, in one file that imports torch only.

Muon (Jordan et al., 2024) is for the matrices of the hidden layers. It keeps a running mean of the
gradient and moves each weight by the nearest (semi-)orthogonal matrix to it, so that all directions
of the update have about the same length. Polar Express (Amsel et al., arXiv 2505.16932) finds that
matrix with five matrix polynomials chosen for the fastest worst-case convergence, in bfloat16.
Embeddings, heads, gains and biases belong to AdamW.

    optimizer = Muon([dict(params=matrices), dict(params=fused_qkv, parts=3)], lr=0.01)
"""
import math

import torch

# optimal_composition(l=1e-3, num_iters=5, safety_factor_eps=2e-2, cushion=0.02), arXiv 2505.16932:
# the odd quintic p(x) = a x + b x^3 + c x^5 of each step. The last is not scaled by the safety
# factor. test_model.py derives them anew.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@torch.no_grad()
def polar_express(G, dtype=torch.bfloat16):
    """The polar factor of each matrix of G (N, rows, cols), computed in `dtype`.

    It is about U V^T where G = U S V^T: singular values from 1e-3 of the Frobenius norm up land in
    about [0.85, 1.14]; a zero matrix stays zero.
    """
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X                                 # X X^T is then the smaller Gram matrix
    norm = torch.linalg.matrix_norm(X, keepdim=True)
    X = X / (norm * 1.02 + 1e-6)                            # singular values in [0, 1 / 1.02]
    for a, b, c in COEFFICIENTS:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)         # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)                  # a X + B X
    return X.mT if tall else X


def split(p, parts):
    """`parts` matrices stacked by rows, (parts * rows, cols) or a batch of it: (N, rows, cols)."""
    return p.unflatten(-2, (parts, -1)).flatten(0, -3)


@torch.no_grad()
def normalise_rows(update, variance, beta2):
    """NorMuon (arXiv 2510.05491): divide each row, or column if wide, by its running RMS.

    The matrix keeps its norm. `variance`, the running mean square (N, rows, 1) or (N, 1, cols), is
    changed in place.
    """
    across = -1 if variance.size(-1) == 1 else -2
    square = update.float().square().mean(across, keepdim=True)
    variance.lerp_(square.to(variance.dtype), 1 - beta2)
    scaled = update * variance.clamp(min=1e-10).rsqrt().to(update.dtype)
    before = torch.linalg.matrix_norm(update.float(), keepdim=True)
    after = torch.linalg.matrix_norm(scaled.float(), keepdim=True)
    return scaled * (before / after.clamp(min=1e-10)).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Muon as the ExoFormer paper uses it (Table 4). Each parameter is a matrix, or several.

    lr            step length; each update is further scaled by sqrt(max(1, rows / cols))
    momentum      of the gradient's running mean: buf = momentum * buf + (1 - momentum) * grad
    nesterov      look ahead: orthogonalise (1 - momentum) * grad + momentum * buf instead of buf
    weight_decay  decoupled (times lr)
    cautious      decay only entries whose sign agrees with the update: decay never fights it
    beta2         None, or the decay rate of NorMuon's second moment (the released code: 0.95)
    parts         equal matrices stacked in each parameter of the group (fused Q, K, V: 3), each
                  orthogonalised by itself
    polar         the orthogonaliser, (N, rows, cols) -> the same; one call takes all parameters of
                  a shape together

    The state has the dtype of the parameters. In bfloat16 an update of 1e-3 of a weight is rounded
    away.
    """

    def __init__(self, params, lr=0.01, momentum=0.95, nesterov=True, weight_decay=0.1,
                 cautious=True, beta2=None, parts=1, polar=polar_express):
        defaults = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                        cautious=cautious, beta2=beta2, parts=parts)
        super().__init__(params, defaults)
        self.polar = polar

    @torch.no_grad()
    def step(self):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            same_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    same_shape.setdefault((p.shape, p.dtype, p.device), []).append(p)
            for params in same_shape.values():
                self.update(params, group)

    def update(self, params, group):
        """One update of parameters of one shape, their matrices orthogonalised in one batch."""
        momentum = group["momentum"]
        lr = group["lr"]
        grads = [p.grad for p in params]
        means = [self.buffer(p, "momentum_buffer", p.shape) for p in params]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, means, momentum) if group["nesterov"] else means
        matrices = torch.cat([split(g, group["parts"]) for g in ahead])     # (N, rows, cols)
        update = self.polar(matrices)
        if group["beta2"] is not None:
            update = self.normalise(params, update, group["beta2"])
        rows, cols = update.shape[-2:]
        update = update * math.sqrt(max(1, rows / cols))
        for p, u in zip(params, update.chunk(len(params))):
            u = u.reshape(p.shape).to(p.dtype)
            decayed = torch.where(u * p >= 0, p, 0) if group["cautious"] else p
            # two subtractions, as in the released code: in bfloat16 the first rounds to nothing
            p.sub_(decayed, alpha=lr * group["weight_decay"])
            p.sub_(u, alpha=lr)

    def normalise(self, params, update, beta2):
        """`normalise_rows` of the updates (N, rows, cols) of params, whose variances are kept."""
        each = len(update) // len(params)
        rows, cols = update.shape[-2:]
        shape = (each, rows, 1) if rows >= cols else (each, 1, cols)
        variances = [self.buffer(p, "variance_buffer", shape) for p in params]
        stacked = torch.cat(variances)
        update = normalise_rows(update, stacked, beta2)
        torch._foreach_copy_(variances, stacked.split(each))
        return update

    def buffer(self, p, name, shape):
        """A state tensor of parameter p, zero at first."""
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros(shape, dtype=p.dtype, device=p.device)
        return state[name]
