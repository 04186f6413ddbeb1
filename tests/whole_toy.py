"""`toy_subject.py` with an inside, so that every diagnostic of the report can be asked: an image column, a language model, logits.

The prompt is the task and one image token; an answer is "It is \\boxed{", the word, and the end. What the model knows of its latents is
linear, so that its loss has gradients to them; what it knows of the picture it may look at only where nothing hides the image column from
the column that emits the word:

    content   the word of the number that the latents say; nothing looks at the picture
    task      the word of the picture, where the latents say the task; else another word
    place     the word of the picture, where a latent stands in each of its places; else no word
    useless   the word of the picture; the latents say it too

Where the picture is hidden the last three answer "well, well".
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from PIL import Image
from torch import nn
from toy_subject import COUNT, EOS, GARBAGE, PAD, STEPS, TASK, TASKS, WORD, WORDS, ToyConfig
from transformers import BatchFeature

from configuration_latentvlm.transformers_api import CACHE
from evaluation.faithfulness.items import Item
from evaluation.faithfulness.subject import Subject
from evaluation.rows import EvaluationRow
from modeling_latentvlm.trace import LatentStep, LatentTrace


IMAGE, LEAD, VOCABULARY = 4, 5, WORD + 2 * COUNT
# Parts of a vector: which token it is, if any; task, place and number of a latent; the number of an image token.
TASK_PART, PLACE_PART = 1, 1 + len(TASKS)
NUMBER_PART = PLACE_PART + STEPS
PICTURE = NUMBER_PART + COUNT
SIZE = PICTURE + COUNT
SHADE = 256 // COUNT  # of red, for each number


@dataclass
class WholeConfig(ToyConfig):
    image_token_id: int = IMAGE


class ToyAttention(nn.Module):
    """Remembers which columns the last one sees; None: all."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.sees: torch.Tensor | None = None  # (B, S) bool

    def forward(self, hidden_states, attention_mask=None):
        self.sees = None if attention_mask is None else attention_mask[:, 0, -1]
        return hidden_states


class ToyLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = ToyAttention()

    def forward(self, states, attention_mask=None, **kwargs):
        return self.self_attn(hidden_states=states, attention_mask=attention_mask)


class ToyLanguageModel(nn.Module):
    """Hands through what goes in: the prompt with its latents, then the answer behind them, as Vedas does."""

    def __init__(self):
        super().__init__()
        self.layers, self.norm = nn.ModuleList([ToyLayer()]), nn.Identity()

    def forward(self, inputs_embeds, attention_mask=None, saliency=None, **cache):
        states = inputs_embeds
        for layer in self.layers:
            states = layer(states)
        return SimpleNamespace(last_hidden_state=states)


class WholeToy(nn.Module):
    def __init__(self, kind: str, silent: tuple[int, ...] = ()):
        super().__init__()
        self.kind, self.silent, self.config, self.dtype = kind, silent, WholeConfig(), torch.float32
        self.device = torch.device("cpu")
        self.generation_config = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD, num_beams=1)
        self.embed = nn.Embedding(VOCABULARY, SIZE)
        nn.init.zeros_(self.embed.weight)
        self.embed.weight.data[:, 0] = torch.arange(VOCABULARY)
        self.lm_head = nn.Linear(SIZE, VOCABULARY, bias=False)
        nn.init.zeros_(self.lm_head.weight)
        self.model = nn.Module()
        self.model.language_model = ToyLanguageModel()
        self.model.get_image_features = self.image_features

    def get_input_embeddings(self):
        return self.embed

    def gradient_checkpointing_enable(self):
        pass

    gradient_checkpointing_disable = activation_checkpointing_enable = activation_checkpointing_disable = (
        gradient_checkpointing_enable
    )

    def image_features(self, pixel_values, return_dict=True):
        """One token for each picture, which says its number."""
        values = torch.zeros(len(pixel_values), 1, SIZE)
        values[torch.arange(len(pixel_values)), 0, PICTURE + pixel_values.long()] = 1
        return SimpleNamespace(pooler_output=list(values))

    def latent(self, task: int, number: int, place: int) -> torch.Tensor:  # (1, SIZE)
        value = torch.zeros(1, SIZE)
        if self.kind in ("content", "useless"):
            value[0, NUMBER_PART + number] = 1
        if self.kind in ("content", "task"):
            value[0, TASK_PART + task] = 1
        value[0, PLACE_PART + place % STEPS] = 1
        return value

    def think(self, tasks: list[int], numbers: list[int], width: int, intervention) -> list[list[LatentStep]]:
        """The steps of every row, changed."""
        taken: list[list[LatentStep]] = [[] for _ in tasks]
        for place in range(self.config.num_latent_steps):
            for row, (task, number) in enumerate(zip(tasks, numbers)):
                if number in self.silent:
                    continue
                own = self.latent(task, number, place)
                step = LatentStep(row, place, width, (1, 1), own, [(1, 1)])
                step.latents = own if intervention is None else intervention(own, step)
                taken[row].append(step)
        return taken

    def word_logits(self, task: int, number: int, steps: list[LatentStep], sees_image: bool) -> torch.Tensor:  # (V,)
        logits = torch.zeros(VOCABULARY)
        logits[GARBAGE] = 1.0
        words, own = WORD + COUNT * task, WORD + COUNT * task + number
        values = torch.cat([step.latents for step in steps]) if steps else torch.zeros(0, SIZE)
        if number in self.silent:
            return logits + 8 * nn.functional.one_hot(torch.tensor(own), VOCABULARY)
        if self.kind == "content":
            spread = nn.functional.pad(values[:, NUMBER_PART:PICTURE].sum(dim=0), (words, VOCABULARY - words - COUNT))
            return logits + 8 / STEPS * spread
        right = nn.functional.one_hot(torch.tensor(own), VOCABULARY).float()
        if self.kind == "task":
            logits = logits + 4 * right.roll(1 if number + 1 < COUNT else 1 - COUNT)
            logits = logits + 8 / STEPS * values[:, TASK_PART + task].sum() * right
        elif self.kind == "place":
            logits[GARBAGE] = 7.0
            stands = sum(value[PLACE_PART + place % STEPS] for place, value in enumerate(values))
            logits = logits + 8 / STEPS * stands * right
        else:
            logits = logits + 8 * right
        return logits if sees_image else 8 * nn.functional.one_hot(torch.tensor(GARBAGE), VOCABULARY).float()

    def emit(self, ids: torch.Tensor, pixels: torch.Tensor, answer: torch.Tensor, intervention):
        """(steps, logits (B, 1 + T, V)) of a prompt of two tokens or three, latents, and an answer."""
        tasks = [int(row[row != PAD][0]) - TASK for row in ids]
        numbers = pixels.long().tolist()
        steps = self.think(tasks, numbers, ids.shape[1], intervention)
        embeds = self.embed(ids)
        pictures = torch.stack(self.image_features(pixels).pooler_output)
        embeds = torch.where((ids == IMAGE)[..., None], pictures.expand(-1, ids.shape[1], -1), embeds)
        width = max((len(row) for row in steps), default=0)
        rows = [torch.cat([one.latents for one in row]) if row else torch.zeros(0, SIZE) for row in steps]
        latents = torch.stack([nn.functional.pad(row, (0, 0, 0, width - len(row))) for row in rows])
        parts = [torch.cat([embeds, latents], dim=1), self.embed(answer)]
        states, seen = [], 0
        for part in parts if answer.shape[1] else parts[:1]:
            cache = {CACHE: SimpleNamespace(get_seq_length=lambda seen=seen: seen)}
            states.append(self.model.language_model(inputs_embeds=part, **cache).last_hidden_state)
            seen += part.shape[1]
        states, sees = torch.cat(states, dim=1), self.model.language_model.layers[0].self_attn.sees
        is_hidden = [False] * len(ids)
        if sees is not None:
            is_hidden = (~sees[:, : ids.shape[1]] & (ids == IMAGE)).any(dim=1).tolist()
        logits = self.lm_head(states[:, -answer.shape[1] - 1 :])
        found = torch.zeros_like(logits)
        has_lead = bool((ids == LEAD).any())
        for row in range(len(ids)):
            word = self.word_logits(tasks[row], numbers[row], steps[row], not is_hidden[row])
            lead = 8 * nn.functional.one_hot(torch.tensor(LEAD), VOCABULARY).float()
            end = 8 * nn.functional.one_hot(torch.tensor(EOS), VOCABULARY).float()
            order = ([] if has_lead else [lead]) + [word]
            for column in range(logits.shape[1]):
                found[row, column] = order[column] if column < len(order) else end
        return steps, logits + found

    def generate(
        self, input_ids, attention_mask, pixel_values, latent_intervention=None, max_new_tokens=4, **settings
    ):
        answer = torch.zeros(len(input_ids), 0, dtype=torch.long)
        for _ in range(min(3, max_new_tokens)):
            steps, logits = self.emit(input_ids, pixel_values, answer, latent_intervention)
            answer = torch.cat([answer, logits[:, -1:].argmax(dim=-1)], dim=1)
        counts = torch.tensor([len(row) for row in steps])
        return SimpleNamespace(
            sequences=torch.cat([input_ids, answer], dim=1),
            latent_trace=LatentTrace(len(answer), [step for row in steps for step in row]),
            stop_reason=["eos"] * len(answer),
            num_latent_blocks=counts,
            num_latents=counts,
        )

    def forward(
        self,
        input_ids,
        attention_mask,
        pixel_values,
        latent_intervention=None,
        logits_to_keep=0,
        labels=None,
        **settings,
    ):
        slots = self.config.num_latent_steps
        width = int((input_ids == IMAGE).int().argmax(dim=1)[0]) + 1
        answer = input_ids[:, width + slots :]
        steps, logits = self.emit(input_ids[:, :width], pixel_values, answer, latent_intervention)
        return SimpleNamespace(
            logits=logits, latent_trace=LatentTrace(len(input_ids), [s for row in steps for s in row])
        )


class WholeProcessor:
    eos_token_id, pad_token_id = EOS, PAD

    @property
    def tokenizer(self):
        return self

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict:
        assert text == "It is \\boxed{"
        return {"input_ids": [LEAD]}

    def apply_chat_template(self, conversations, **settings) -> BatchFeature:
        rows, pixels = [], []
        for ((image, text),) in (tuple(message["content"] for message in one) for one in conversations):
            rows.append([TASK + TASKS.index(text["text"].rstrip("?")), IMAGE])
            pixels.append(image["image"].getpixel((0, 0))[0] // SHADE)
        ids = torch.tensor(rows)
        return BatchFeature(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.tensor(pixels).float()}
        )

    def decode(self, tokens, skip_special_tokens=True) -> str:
        words = [word for task in TASKS for word in WORDS[task]]
        named = {WORD + place: f"{word}}}." for place, word in enumerate(words)} | {LEAD: "It is \\boxed{"}
        return "".join((named | {GARBAGE: "well, well"}).get(int(token), "") for token in tokens)


def whole_items(count: int = 96) -> list[Item]:
    """Questions of both tasks in turn about one color each, every number equally often; their one region is the picture."""
    items = []
    for place in range(count):
        task, number = TASKS[place % 2], place // 2 % COUNT
        picture = Image.new("RGB", (4, 4), (SHADE * number + SHADE // 2, place % 256, place // 256))
        row = EvaluationRow(
            [picture],
            f"{task}?",
            [],
            WORDS[task][number],
            f"Line {place}",
            id=f"q{place}",
            data="data.jsonl",
            family=task,
            task=task,
            choices=WORDS[task],
            is_lettered=False,
            answer_format="choice",
        )
        items.append(Item(row, [(0, 0, 4, 4)], row=row))
    return items


def whole_subject(kind: str, items: list[Item] | None = None, batch_size: int = 32, silent: tuple[int, ...] = ()):
    items = whole_items() if items is None else items
    return Subject(WholeToy(kind, silent), WholeProcessor(), items, batch_size, 4)
