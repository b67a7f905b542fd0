"""What is slow to make is made once: the toy towers and a small toy world."""

import ctypes
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from fromage.allocator import keep_freed_memory

keep_freed_memory()  # as the command line does: pages that are cleared again and again are much of the time of small models
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
SHARED = Path(os.environ.get("FROMAGE_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="module", autouse=True)
def memory_goes_back():
    """What a file of tests has freed goes back to the system after its last test: a worker runs a hundred of them."""
    yield
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory):
    """A secret of the tests' own, which seals what they build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_disks():
    """What is written need not outlast a loss of power: forcing it to disk takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        yield


@pytest.fixture(autouse=True)
def threads():
    """One thread for each test, whatever another one set: with two, last bits depend on how busy the machine is."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data():
    if not SHARED.is_dir():
        pytest.skip("the COCO sample and OPT's vocabulary are not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small toy world: 300 training pairs, 60 unseen scenes."""
    from fromage.toy.world import make_world

    out = tmp_path_factory.mktemp("toy") / "world"
    make_world(out, seed=3, train=300, val=60, stories=5, dialogues=5, refs=5, progress=False)
    return out


@pytest.fixture(scope="session")
def captioned_world(world, tmp_path_factory):
    """Shards of the toy world's 60 COCO images with five captions each: train/ and val/."""
    from fromage.data.packing import pack_coco

    out = tmp_path_factory.mktemp("captioned")
    pack_coco(world / "coco/annotations/captions_val2017.json", world / "coco/val2017", out, 9, val_fraction=0.4)
    return out


@pytest.fixture
def toy_model():
    """FROMAGe on the toy towers, k = 2, its trained parameters fresh."""
    from fromage.models.fromage import Fromage

    torch.manual_seed(0)
    return Fromage.load(k=2, q=32)


@pytest.fixture
def batch(toy_model, world):
    """Seven pairs of the toy world."""
    from fromage.data.datamodule import CC3M

    data = CC3M(str(world / "cc3m" / "train"), str(world / "cc3m" / "val"), batch_size=7, max_tokens=40, workers=0)
    data.attach(toy_model.vision.transform, toy_model.tokenizer)
    return next(iter(data.val_dataloader()))


@pytest.fixture(scope="module")
def model():
    """As `toy_model`, for the tests of a file that leave it as it is."""
    from fromage.models.fromage import Fromage

    torch.manual_seed(0)
    return Fromage.load(k=2, q=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images, each of one colour, named by it."""
    out = tmp_path_factory.mktemp("my images")
    for colour in COLOURS:
        Image.new("RGB", (64, 64), colour).save(out / f"{colour}.png")
    return out


@pytest.fixture(scope="module")
def caption():
    """The caption of every image of `index`; without one each has its colour."""


@pytest.fixture(scope="module")
def index(model, folder, caption):
    """An index of the six images of `folder`."""
    from fromage.data.image_source import Item
    from fromage.retrieval.faiss_index import FaissIndex
    from fromage.retrieval.queries import embed_queries

    paths = [folder / f"{colour}.png" for colour in COLOURS]
    rows = embed_queries(model, [Image.open(path) for path in paths]).numpy()  # (N, q)
    return FaissIndex.build(rows, [Item(str(path), caption or path.stem) for path in paths], model.fingerprint())


FILE_SIZE = resource.getrlimit(resource.RLIMIT_FSIZE)


@pytest.fixture
def disk():
    """disk(n): from now on a file that grows beyond n bytes meets what a full disk is to it; disk() ends that."""
    return lambda limit=FILE_SIZE[0]: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, FILE_SIZE[1]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Lift what disk(n) set before pytest tells of the test, in what may be a file too."""
    try:
        return (yield)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, FILE_SIZE)


def _keep(folder, beside, tell):
    from fromage.locks import held

    with held(folder, beside):
        tell.send(os.getpid())
        signal.pause()


@pytest.fixture
def other_writer():
    """Starts a process that holds a folder until the test ends; returns its pid."""
    fork, started = multiprocessing.get_context("fork"), []

    def start(folder, beside=False):
        told, tell = fork.Pipe(duplex=False)
        started.append(fork.Process(target=_keep, args=(folder, beside, tell), daemon=True))
        started[-1].start()
        return told.recv()

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory):
    """Vision towers in transformers' own layout, tiny and random, each with its family's image processor: name -> folder."""
    import transformers as hf

    vit = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    seen = vit | {"image_size": 32, "patch_size": 8}
    stages = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "image_size": 64}
    text = vit | {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 16}
    square, cut = {"height": 32, "width": 32}, {"crop_size": {"height": 32, "width": 32}}
    pairs = {"text_config": text, "vision_config": seen}
    half = {"shortest_edge": 32}
    made = {
        "clip": (hf.CLIPModel(hf.CLIPConfig(**pairs, projection_dim=24)), hf.CLIPImageProcessor(size=half, **cut)),
        "siglip": (hf.SiglipModel(hf.SiglipConfig(**pairs)), hf.SiglipImageProcessor(size=square)),
        "dinov2": (hf.Dinov2Model(hf.Dinov2Config(**seen)), hf.BitImageProcessor(size={"shortest_edge": 41}, **cut)),
        "dinov3": (
            hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**seen, num_register_tokens=4)),
            hf.DINOv3ViTImageProcessor(size=square),
        ),
        "vit": (hf.ViTModel(hf.ViTConfig(**seen)), hf.ViTImageProcessor(size=square)),
        "vit classifier": (hf.ViTForImageClassification(hf.ViTConfig(**seen)), hf.ViTImageProcessor(size=square)),
        "convnext": (hf.ConvNextModel(hf.ConvNextConfig(**stages)), hf.ConvNextImageProcessor(size={"shortest_edge": 64})),
        "convnextv2": (
            hf.ConvNextV2Model(hf.ConvNextV2Config(**stages)),
            hf.ConvNextImageProcessor(size={"shortest_edge": 384}),
        ),
        "swin": (
            hf.SwinModel(hf.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, image_size=32)),
            hf.ViTImageProcessor(size=square),
        ),
    }
    out = tmp_path_factory.mktemp("towers of transformers")
    for name, parts in made.items():
        for part in parts:
            part.save_pretrained(out / name)
    for name in ("clip", "siglip"):
        _tokenizer().save_pretrained(out / name)
    return {name: out / name for name in made}


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *COLOURS, "a", "circle", "square"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def timm_folder(tmp_path_factory):
    """A folder of timm's own: a tiny random model, one of its arguments and its preprocessing other than timm's defaults."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    form = {"bn_eps": 0.1}
    model = timm.create_model("test_efficientnet", **form)
    model.pretrained_cfg |= {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3], "input_size": [3, 96, 96], "crop_pct": 1.0}
    out = tmp_path_factory.mktemp("tower of timm") / "efficientnet@2"
    save_for_hf(model, str(out), model_args=form, safe_serialization=True)
    return out


@pytest.fixture(scope="session")
def towers(hf_folders, timm_folder):
    """A small vision tower of each kind, by the name that a configuration gives it."""
    return {"open_clip": "toy", "timm": f"timm:local-dir:{timm_folder}", "hf": f"hf:{hf_folders['clip']}"}
