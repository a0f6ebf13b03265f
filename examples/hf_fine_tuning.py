"""Fine-tuning a transformers model on scarce data, with AdamW and with Functional-SAM: which one overfits less?

The model is a tiny Llama made here, so that no network is needed; put `AutoModelForCausalLM.from_pretrained` there.
"""

import copy
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments

from fsam_core import FunctionalSAM, Plain
from fsam_trainers.integrations.hf_trainer import FsamTrainer

LENGTH = 64
folder = Path(torch.__file__).parent


def windows(name, count, start=0):
    """Sequences of bytes from a file, as a Trainer's dataset."""
    ids = torch.tensor(list((folder / name).read_bytes()))[start * LENGTH : (start + count) * LENGTH]
    return [{"input_ids": row, "labels": row} for row in ids.view(-1, LENGTH)]


def trained(model, data, method, epochs, rate):
    """The model after some epochs of the Trainer's own loop with the method's gradient."""
    arguments = TrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=rate, seed=0,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = FsamTrainer(model, arguments, train_dataset=data, method=method, check_first=False)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def loss_of(model, data):
    """Mean loss a token of held-out sequences."""
    ids = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
print(f"untrained:       loss {loss_of(base, windows('serialization.py', 32)):.3f}")
base = trained(base, windows("functional.py", 512), Plain(), epochs=4, rate=3e-3)

scarce, held_out = windows("serialization.py", 32), windows("serialization.py", 32, start=64)
print(f"pretrained:      loss {loss_of(base, held_out):.3f} on another file's text")
for name, method in {"AdamW": Plain(), "Functional-SAM": FunctionalSAM(rho=0.2, precondition="adam")}.items():
    tuned = trained(copy.deepcopy(base), scarce, method, epochs=16, rate=1e-3)
    print(f"{name + ':':16} loss {loss_of(tuned, held_out):.3f} held out, {loss_of(tuned, scarce):.3f} on its own text")
