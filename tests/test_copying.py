"""README's section on copying: the prompt modules work with a CLIP that is not open_clip's."""

from types import SimpleNamespace

import open_clip
import pytest
import torch
from torch import nn

import common
import prograd
import vpt

W, D, LENGTH, HEADS, LAYERS = 32, 16, 77, 2, 3


class Block(nn.Module):
    """A residual attention block in the layout of OpenAI's package: sequence first, no layer scale."""

    def __init__(self):
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(W, HEADS), nn.LayerNorm(W), nn.LayerNorm(W)
        self.mlp = nn.Sequential(nn.Linear(W, 4 * W), nn.GELU(), nn.Linear(4 * W, W))

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OtherClip(nn.Module):
    """The text half of a CLIP, with the attribute names that README asks for and nothing of open_clip."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(49408, W)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(LENGTH, W))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_final, self.text_projection = nn.LayerNorm(W), nn.Parameter(torch.randn(W, D))

    def features(self, embeddings, eot):
        """The plain way: whole sequences [C, 77, W], each token attending to those before it."""
        mask = torch.full((LENGTH, LENGTH), float("-inf"), dtype=embeddings.dtype).triu(1)
        x = (embeddings + self.positional_embedding).transpose(0, 1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return self.ln_final(x.transpose(0, 1))[torch.arange(len(eot)), eot] @ self.text_projection


@pytest.fixture
def clip():
    torch.manual_seed(0)
    model = OtherClip().double().eval().requires_grad_(False)
    tokenizer = open_clip.SimpleTokenizer()  # OpenAI's has the same encode(); its two ids are 49406 and 49407
    return SimpleNamespace(model=model, tokenizer=tokenizer, width=W, context_length=LENGTH, known=None, memory_gb=4.0,
                           precision="fp32", device="cpu")  # fmt: skip


def plain(clip, context, names):
    """Features of [SOS, context, name, ".", EOT, zeros], every class in full."""
    table, rows, eot = clip.model.token_embedding.weight, [], []
    for name in names:
        ids = clip.tokenizer.encode(f"{name}.") + [49407]
        row = torch.cat([table[[49406]], context, table[ids]])
        eot.append(len(row) - 1)
        rows.append(torch.cat([row, row.new_zeros(LENGTH - len(row), W)]))
    return clip.model.features(torch.stack(rows), torch.tensor(eot))


def test_prompt_learner_with_another_clip(clip):
    names, context = ["cat", "golden retriever", "fire truck"], 0.1 * torch.randn(4, W, dtype=torch.float64)
    learner = prograd.PromptLearner(clip, context)
    ours, theirs = learner(common.name_tokens(clip, names, 4)), plain(clip, learner.context, names)
    assert torch.allclose(ours, theirs, atol=1e-10)
    gradients = [torch.autograd.grad(out.sin().sum(), learner.context)[0] for out in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-10) and gradients[0].abs().max() > 0


@pytest.mark.parametrize("posterior", ["global", "image"])
def test_prompt_distribution_with_another_clip(clip, posterior):
    clip.dim = D
    names, context = ["cat", "dog"], 0.1 * torch.randn(4, W)
    learner = vpt.PromptDistribution(clip, context, posterior, 0.5, 1, [0.0, 1.0]).double()
    x = nn.functional.normalize(torch.randn(3, D, dtype=torch.float64), dim=-1)
    mu, logvar = learner.posterior(x)
    r = vpt.sample_residual(mu, logvar, torch.randn(5, len(mu), W, dtype=torch.float64))  # [L, K, W]
    text = learner(common.name_tokens(clip, names, 4), r)  # [L, K, C, D]
    for sample in range(5):
        for k in range(len(mu)):
            theirs = plain(clip, learner.context + 0.5 * r[sample, k], names)
            assert torch.allclose(text[sample, k], theirs, atol=1e-9)
