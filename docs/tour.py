# %% [markdown]
# # A tour: from one layer to photographs classified elsewhere
#
# Every block below was run, and what it printed stands beneath it. The blocks are the cells of
# [tour.py](tour.py): run it with `python docs/tour.py` (half a minute, no GPU, no download), or
# open it as a notebook in an editor that knows `# %%` cells. `python docs/render.py` writes this
# page. It needs `pip install '.[deploy]' peft`.

# %%
import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))  # the repository's root, where this is run

import peft
import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import normalize

import deit.models  # noqa: F401 - registers the networks with timm
from deit.data import build_dataset, eval_transform
from deit.deploy import fold
from deit.equivariance import (
    assert_equivariant,
    channels,
    equivariance_error,
    image,
    invariant,
    randomize_,
)
from deit.export import main as export
from deit.groups import FLOP
from deit.layers import GELU, Linear
from deit.predict import main as predict
from deit.train.checkpoint import read_checkpoint
from deit.train.weights import load_weights

os.chdir(tempfile.mkdtemp())  # for the files that this writes
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
NAME = "d2_deit_tiny_patch16_LS"
KWARGS = {"patch_size": 7, "embed_dim": 64, "depth": 2, "num_heads": 2, "init_scale": 1.0}


def small_vit(side):
    return timm.create_model(NAME, img_size=side, num_classes=10, **KWARGS)


model = randomize_(small_vit(28)).eval()
images = torch.randn(2, 3, 28, 28)
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
def load(split):
    """Normalised images (N, 3, 28, 28), and their classes."""
    data = build_dataset(split, transform=eval_transform(28))
    pixels, classes = zip(*data, strict=True)
    images = torch.stack(pixels) / 255
    return normalize(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), torch.tensor(classes)


def train(network, images, classes, steps, lr):
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    network.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (50,))
        loss = F.cross_entropy(network(images[batch]), classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(network, images, classes):
    network.eval()
    found = torch.cat([network(part).argmax(1) for part in images.split(500)])
    return f"{100 * (found == classes).float().mean():.1f} %"


images, classes = load("train")
test_images, test_classes = load("val")
model = small_vit(28)
train(model, images, classes, steps=300, lr=3e-3)
print("on the test images", accuracy(model, test_images, test_classes))
print("on their mirror images", accuracy(model, test_images.flip(-1), test_classes))

# %% [markdown]
# ## Fine-tuning at another resolution, from the checkpoint
#
# 35 x 35 pixels are 5 x 5 patches in place of 4 x 4, so the position embedding must be resampled.
# `load_weights` does it such that the network stays exactly equivariant. The command line does
# all of this by `python deit/main.py --finetune FILE --input-size 35`. A checkpoint, as
# `deit/main.py` writes it, also says how the network is built, and what its outputs are called.

# %%
options = {"model": NAME, "input_size": 28, "model_kwargs": list(KWARGS.items())}
names = build_dataset("val").class_names
saved = {"model": model.state_dict(), "args": options, "class_names": names}
torch.save(saved, "checkpoint.pth")

larger = small_vit(35)
print(load_weights(larger, read_checkpoint("checkpoint.pth"), adapt=True))
images_35, test_35 = (F.interpolate(x, 35, mode="bilinear") for x in (images, test_images))
print("before", accuracy(larger, test_35, test_classes))
train(larger, images_35, classes, steps=100, lr=1e-3)
print("after", accuracy(larger, test_35, test_classes))
print("on their mirror images", accuracy(larger, test_35.flip(-1), test_classes))

# %% [markdown]
# ## Fine-tuning with a LoRA on the halves
#
# Inside every equivariant `Linear` are two ordinary `nn.Linear`s, one for s and one for a, so tools
# that adapt such layers find them. PEFT, which only this page and the tests need, puts a small
# correction beside each. A correction of either half mixes no halves: the network stays
# equivariant, and the merged weights are an ordinary checkpoint. The task here is new to the
# network: the images upside down.

# %%
upside_down, test_upside_down = images.flip(-2), test_images.flip(-2)
targets = ["linear_sym", "linear_asym"]
config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["head"])
adapted = peft.get_peft_model(copy.deepcopy(model), config)
adapted.print_trainable_parameters()
print("upside down, before", accuracy(adapted, test_upside_down, test_classes))
train(adapted, upside_down, classes, steps=100, lr=5e-3)
print("upside down, after", accuracy(adapted, test_upside_down, test_classes))
print("on their mirror images", accuracy(adapted, test_upside_down.flip(-1), test_classes))
print(equivariance_error(adapted, FLOP, test_images[:4], image(FLOP), invariant))
merged = small_vit(28)
merged.load_state_dict(adapted.merge_and_unload().state_dict())
print("merged", accuracy(merged, test_upside_down, test_classes))

# %% [markdown]
# ## Folding it
#
# Once a network is trained, much of it can be folded into its weights. The two kernels of the patch
# embedding become one convolution. The order of the tokens and the factors of the change of basis
# vanish. LayerScale moves into the weights before it. Fewer operations are left, all of them
# standard.

# %%
folded = fold(model)
for name, network in {"trained": model, "folded ": folded}.items():
    program = torch.export.export(network.eval(), (test_images[:1],))
    operations = sum(node.op == "call_function" for node in program.graph.nodes)
    print(name, operations, "operations,", accuracy(network, test_images, test_classes))
with torch.no_grad():
    difference = (folded(test_images) - model(test_images)).abs().max()
print("as the network:", bool(difference < 1e-4))

# %% [markdown]
# ## Exporting it
#
# `deit/export.py` folds a checkpoint's network, writes it, runs the file in its own runtime and
# compares. On a command line this is `python deit/export.py --resume checkpoint.pth ...`. Other
# formats are torch-export and safetensors.

# %%
file = ["--format", "onnx", "--dynamic-batch", "--output", "network.onnx"]
export(["--resume", "checkpoint.pth", *file])

# %% [markdown]
# ## Running it elsewhere
#
# The file needs neither this package nor PyTorch. It says itself what its outputs are called and
# how to prepare images. Here are two photographs, one of them the other's mirror image.

# %%
Path("photos").mkdir()
photograph = build_dataset("val").load(0)
photograph.save("photos/shoe.png")
photograph.transpose(0).save("photos/mirrored.png")

script = """
import json, sys
import numpy, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("network.onnx")
said = session.get_modelmeta().custom_metadata_map
mean, std, names = (json.loads(said[key]) for key in ("mean", "std", "class_names"))
files = ["photos/shoe.png", "photos/mirrored.png"]
pixels = numpy.stack([numpy.asarray(Image.open(file).convert("RGB")) for file in files])
images = ((pixels / 255 - mean) / std).astype(numpy.float32).transpose(0, 3, 1, 2)
(logits,) = session.run(None, {"images": images})
print(*[names[place] for place in logits.argmax(1)], sep=", ")
print("greatest difference of the two", f"{abs(logits[0] - logits[1]).max():.0e}")
print("imported of torch and deit:", [name for name in ("torch", "deit") if name in sys.modules])
"""
done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
print(done.stdout, end="")

# %% [markdown]
# ## Predicting
#
# For folders of real photographs there is `deit/predict.py`. It takes either file, and gives the
# same answers.

# %%
for network in (["--checkpoint", "checkpoint.pth"], ["--onnx", "network.onnx"]):
    predict(["photos", *network, "--topk", "2", "--device", "cpu"])
