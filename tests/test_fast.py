"""common.linear and vision.hasten: faster, the same numbers. At sizes large enough for the fast way to be taken."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from golden_world import deviation
from open_clip.transformer import ResidualAttentionBlock

import common
import vision
from common import Clip

VISION = {"image_size": 48, "layers": 3, "width": 256, "head_width": 64, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 2}


def model(**vision_cfg):
    torch.manual_seed(0)
    return open_clip.CLIP(64, VISION | vision_cfg, TEXT, quick_gelu=True).eval().requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_f_linear(bias):
    x, weight, g = torch.randn(3, 70, 256), torch.randn(512, 256) / 16, torch.randn(3, 70, 512)
    inputs = [x, weight, torch.randn(512)][: 2 + bias]
    outputs = {}
    for kind, function, dtype in (("ours", common.linear, torch.float32), ("exact", F.linear, torch.float64)):
        learned = [part.to(dtype).requires_grad_() for part in inputs]
        y = function(*learned)
        outputs[kind] = [y, *torch.autograd.grad(y, learned, g.to(dtype))]
        if kind == "ours" and torch.backends.mkldnn.is_available():
            assert "Convolution" in str(y.grad_fn.next_functions) + str(y.grad_fn.next_functions[0][0].next_functions)
    assert all(a.shape == b.shape and deviation(a, b) < 2e-6 for a, b in zip(outputs["ours"], outputs["exact"]))


def test_linear_leaves_small_products_and_other_types_alone():
    x, weight = torch.randn(3, 70, 64), torch.randn(256, 64)
    assert torch.equal(common.linear(x, weight), F.linear(x, weight))  # toyclip's sizes: to the last bit
    x, weight = torch.randn(3, 70, 256).double(), torch.randn(512, 256).double()
    assert torch.equal(common.linear(x, weight), F.linear(x, weight))


def test_prompts_equal_the_full_sequence_at_this_size():
    net, C, P, S = model(), 40, 9, 6
    clip, lengths = Clip(net), torch.arange(C) % 3 + 3
    prefix = (0.1 * torch.randn(1, P, 256)).requires_grad_()
    suffix = 0.1 * torch.randn(C, S, 256)
    g = torch.randn(C, 64)
    ours = common.encode_prompts(clip, prefix, suffix, lengths)[0]
    whole = torch.cat([prefix.expand(C, -1, -1), suffix, torch.zeros(C, 77 - P - S, 256)], dim=1)
    x = net.transformer(whole + net.positional_embedding, attn_mask=net.attn_mask)
    plain = net.ln_final(x)[torch.arange(C), P + lengths] @ net.text_projection
    assert deviation(ours, plain) < 1e-5
    assert deviation(*(torch.autograd.grad(y, prefix, g)[0] for y in (ours, plain))) < 2e-5


def test_hastened_image_tower_has_the_same_features_gradients_and_names():
    plain = model().visual
    fast, images, g = vision.hasten(copy.deepcopy(plain)), torch.randn(6, 3, 48, 48), torch.randn(6, 64)
    assert not {type(block) for block in fast.transformer.resblocks} & {ResidualAttentionBlock}
    assert list(fast.state_dict()) == list(plain.state_dict())
    shapes = []
    fast.transformer.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape))
    results = []
    for tower in (fast, plain):
        tower.requires_grad_(True)
        y = tower(images)
        results.append([y, *torch.autograd.grad(y, list(tower.parameters()), g)])
    assert shapes == [(6, 1, 256)]  # of the last layer the class token alone
    assert all(deviation(a, b) < 2e-5 for a, b in zip(*results))
    again = vision.hasten(copy.deepcopy(fast))
    assert torch.equal(again(images), fast(images))
    assert copy.deepcopy(plain)(images).shape == (6, 64)  # the original was left alone
    assert {type(block) for block in plain.transformer.resblocks} == {ResidualAttentionBlock}


def test_hastened_resnet_has_the_same_features_and_gradients():
    torch.manual_seed(0)
    heads = {"embed_dim": 512, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 64}}
    plain = open_clip.CLIP(**heads, text_cfg=TEXT).visual.eval()
    fast, images, g = vision.hasten(copy.deepcopy(plain)), torch.randn(3, 3, 64, 64), torch.randn(3, 512)
    assert fast.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    results = []
    for tower in (fast, plain):
        y = tower(images)
        results.append([y, *torch.autograd.grad(y, list(tower.parameters()), g)])
    assert all(deviation(a, b) < 2e-5 for a, b in zip(*results))


@pytest.mark.parametrize("cfg", [{"pool_type": "avg"}, {"attentional_pool": True}, {"block_type": "custom"}])
def test_other_image_towers_are_left_alone(cfg):
    tower, images = model(**cfg).visual, torch.randn(2, 3, 48, 48)
    before = tower(images)
    assert torch.equal(vision.hasten(tower)(images), before)
