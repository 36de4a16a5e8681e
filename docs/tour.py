# %% [markdown]
# # A tour: from one layer to an exported network
#
# Every block below was run, and what it printed stands beneath it. The blocks are the cells of
# [tour.py](tour.py): run it with `python docs/tour.py` (half a minute, no GPU, no download), or
# open it as a notebook in an editor that knows `# %%` cells. `python docs/render.py` writes this
# page. It needs `pip install onnx onnxscript onnxruntime peft`.

# %%
import copy
import logging
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))  # the repository's root, where this is run

import onnxruntime
import peft
import torch
import torch.nn.functional as F

from deit.data.datasets import SAMPLE_FOLDER
from deit.equivariance import (
    assert_equivariant,
    channels,
    equivariance_error,
    image,
    invariant,
    randomize_,
)
from deit.groups import FLOP
from deit.layers import GELU, Linear
from deit.models.vit import VisionTransformer
from deit.train.checkpoint import load_model, model_state, read_checkpoint
from deit.train.finetune import load_for_finetune
from experiments.fashion_mnist.images import Images, TestBatches, training_batches

torch.manual_seed(0)
torch.set_printoptions(precision=2, linewidth=100, sci_mode=False)

# %% [markdown]
# ## One layer
#
# A feature is a tuple of two *parts*: s, the symmetric channels, and a, the antisymmetric ones.
# Flopping the image leaves s alone and negates a, so a linear layer must not mix them: it holds an
# ordinary `nn.Linear` for each. Side by side, [s | a], the parts make a *packed* feature. The
# layer's whole matrix, read off by feeding it the unit vectors, is block-diagonal: two products of
# half the width.

# %%
layer = Linear(8, 8, bias=False)
rep = layer.in_rep
unit_vectors = tuple(rep.split(torch.eye(8)))
matrix = torch.cat(layer(unit_vectors), -1).detach().T
print(matrix)
print("weights:", sum(p.numel() for p in layer.parameters()), "of", 8 * 8)

# %% [markdown]
# The *regular basis* is the one people think in: one channel and its mirror image, which flopping
# swaps. There the same matrix is full, and its blocks are equal in pairs, [[A, B], [B, A]]: what a
# channel does to another, its mirror image does to the other's mirror image. The change of basis,
# s = (r + r')/√2 and a = (r - r')/√2, makes it block-diagonal. This is where the FLOPs go.

# %%
regular = rep.to_regular(rep.to_regular(matrix, 0), 1)
(A, B), (C, D) = (half.chunk(2, 1) for half in regular.chunk(2, 0))
print("A = D:", torch.allclose(A, D, atol=1e-6), "  B = C:", torch.allclose(B, C, atol=1e-6))
print(
    "zeros in the regular basis:", int((regular == 0).sum()), " packed:", int((matrix == 0).sum())
)

# %% [markdown]
# ## Checking equivariance
#
# One line checks a layer: it must not matter whether the group acts before or after it. The check
# also demands that different inputs give different outputs, or a layer that ignores its input would
# pass. An ordinary layer fails, and so does a GELU applied to s and to a: it must be applied in the
# regular basis, which `GELU` does.

# %%
packed = torch.randn(4, 16, 8)
x = tuple(rep.split(packed))
print("linear       ", assert_equivariant(layer, FLOP, x, channels(rep), channels(rep)))
print("GELU         ", assert_equivariant(GELU(8), FLOP, x, channels(rep), channels(rep)))
for name, wrong in {"nn.Linear    ": torch.nn.Linear(8, 8), "plain GELU   ": F.gelu}.items():
    print(name, equivariance_error(wrong, FLOP, packed, channels(rep), channels(rep)))

# %% [markdown]
# ## A network
#
# A small equivariant ViT for 28 x 28 images. With any weights at all, an image and its mirror image
# get the same logits, and their feature maps are mirror images of each other.


# %%
def small_vit(img_size: int) -> VisionTransformer:
    return VisionTransformer(
        img_size, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=2,
        init_scale=1.0,
    )  # fmt: skip


model = randomize_(small_vit(28)).eval()
images = torch.randn(2, 1, 28, 28)
with torch.no_grad():
    logits, mirrored = model(images), model(images.flip(-1))
    (features,) = model.forward_intermediates(images, 1, intermediates_only=True)
    (swapped,) = model.forward_intermediates(images.flip(-1), 1, intermediates_only=True)
sign = torch.tensor([1.0] * 32 + [-1.0] * 32).view(-1, 1, 1)
print("logits", tuple(logits.shape), "largest difference", f"{(logits - mirrored).abs().max():.0e}")
error = (swapped - sign * features.flip(-1)).abs().max()
print("features", tuple(features.shape), "largest difference", f"{error:.0e}")
print("but two images differ by", f"{(logits[0] - logits[1]).abs().max():.1f}")

# %% [markdown]
# ## Training it briefly
#
# On the 5,000 images of Fashion-MNIST that come with this repository. There is nothing special
# about training an equivariant network: any optimizer and any loss will do. For a real one there is
# `deit/main.py`.


# %%
def train(network, data, steps, lr, side=28):
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    batches = training_batches(data, batch_size=50, seed=0, flip=False, shift=0, start=0)
    network.train()
    for _, (images, targets) in zip(range(steps), batches, strict=False):
        loss = F.cross_entropy(network(resized(images, side)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def resized(images, side):
    return F.interpolate(images, side, mode="bilinear", antialias=True)


@torch.no_grad()
def accuracy(network, data, side=28):
    network.eval()
    batches = TestBatches(data, 500)
    right = sum((network(resized(x, side)).argmax(1) == y).sum() for x, y in batches)
    return f"{100 * right / len(data):.1f} %"


device = torch.device("cpu")
training_set = Images.load(SAMPLE_FOLDER, "train", device)
test_set = Images.load(SAMPLE_FOLDER, "val", device)
model = small_vit(28)
train(model, training_set, steps=200, lr=3e-3)
print("on the test images", accuracy(model, test_set))
print("on their mirror images", accuracy(model, test_set.mirrored()))

# %% [markdown]
# ## Fine-tuning at another resolution, from the checkpoint
#
# 40 x 40 pixels are 10 x 10 patches in place of 7 x 7, so the position embedding must be resampled.
# `load_for_finetune` does it such that the network stays exactly equivariant. The command line does
# all of this by `python deit/main.py --finetune FILE --input-size 40`.

# %%
folder = Path(tempfile.mkdtemp())
torch.save({"model": model.state_dict(), "epoch": 0}, folder / "checkpoint.pth")

source = "checkpoint.pth"
larger = small_vit(40)
state = model_state(read_checkpoint(folder / source), source=source)  # no pickled code is run
print(load_for_finetune(larger, state, source=source))
print("before", accuracy(larger, test_set, 40))
train(larger, training_set, steps=50, lr=5e-4, side=40)
print("after", accuracy(larger, test_set, 40))
print("on their mirror images", accuracy(larger, test_set.mirrored(), 40))

# %% [markdown]
# The checkpoint fits a network of its own size exactly, and another token order is an error.

# %%
load_model(small_vit(28), state, source=source)
state["patch_embed.flatten_and_permute.permutation"] = torch.arange(49)
try:
    load_model(small_vit(28), state, source=source)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Fine-tuning with a LoRA on the halves
#
# Inside every equivariant `Linear` are two ordinary `nn.Linear`s, one for s and one for a, so tools
# that adapt such layers find them. PEFT, which only this page and the tests need, puts a small
# correction beside each. A correction of either half mixes no halves: the network stays
# equivariant, and the merged weights are an ordinary checkpoint. The task here is new to the
# network: the images upside down.

# %%
upside_down, test_upside_down = (
    Images(data.pixels.flip(1), data.targets) for data in (training_set, test_set)
)
targets = ["linear_sym", "linear_asym"]
config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["head"])
adapted = peft.get_peft_model(copy.deepcopy(model), config)
adapted.print_trainable_parameters()
print("upside down, before", accuracy(adapted, test_upside_down))
train(adapted, upside_down, steps=100, lr=5e-3)
print("upside down, after", accuracy(adapted, test_upside_down))
print("on their mirror images", accuracy(adapted, test_upside_down.mirrored()))
print(equivariance_error(adapted, FLOP, torch.randn(4, 1, 28, 28), image(FLOP), invariant))
load_model(model, adapted.merge_and_unload().state_dict(), source="the merged network")
print("merged", accuracy(model, test_upside_down))

# %% [markdown]
# ## Exporting it
#
# `torch.export` takes the network whole, for any batch size.

# %%
larger.eval()
images = torch.randn(3, 1, 40, 40)
batch = torch.export.Dim("batch", min=1, max=64)
program = torch.export.export(larger, (images,), dynamic_shapes=({0: batch},))
torch.export.save(program, folder / "network.pt2")
loaded = torch.export.load(folder / "network.pt2").module()
with torch.no_grad():
    images = torch.randn(7, 1, 40, 40)
    print("as the network:", torch.allclose(loaded(images), larger(images), atol=1e-5))
    print("still invariant:", torch.allclose(loaded(images), loaded(images.flip(-1)), atol=1e-5))

# %% [markdown]
# The same for ONNX, which other runtimes read.

# %%
logging.getLogger("torch.onnx").setLevel(logging.ERROR)
torch.onnx.export(
    larger, (images,), folder / "network.onnx", dynamo=True, verbose=False,
    dynamic_shapes=({0: batch},), input_names=["images"],
)  # fmt: skip
session = onnxruntime.InferenceSession(folder / "network.onnx")
(logits,) = session.run(None, {"images": images.numpy()})
with torch.no_grad():
    print("as the network:", torch.allclose(torch.from_numpy(logits), larger(images), atol=1e-4))
