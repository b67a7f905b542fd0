"""A wrong option or configuration is one line: the option, its value, what is wanted; none of Python's own words."""

import pytest

from fromage.cli.main import main

CALLBACK = "trainer: {callbacks: [{class_path: fromage.SafeCheckpoint, init_args: {%s}}]}"
OPTIONS = {
    "--model.k abc": "model.k is abc; it must be a whole number",
    "--model.k 0": "model.k is 0; it must be a whole number from 1 on",
    "--model.q -1": "model.q is -1; it must be a whole number from 1 on",
    "--model.lr -1": "model.lr is -1.0; it must be a number from 0 on",
    "--model.pairing 2": "model.pairing is 2.0; it must be a number from 0 to 1",
    "--model.dtype evil": "model.dtype is evil; it must be float32 or bfloat16 or float16 or auto",
    "--model.step zz": "model.step is zz; it must be fast or reference",
    "--model.quantize x": "model.quantize is x; it must be int8 or nf4 or null",
    "--model.betas [1]": "model.betas is [1]; it must be 2 values",
    "--model.freeze_temperature x": "model.freeze_temperature is x; it must be true or false",
    "--data.captions_per_image x": "data.captions_per_image is x; it must be a whole number or null",
    "--seed_everything x": "seed_everything is x; it must be true or false or a whole number",
    "--trainer.max_steps abc": "trainer.max_steps is abc; it must be a whole number",
    "--trainer.precision 77": "trainer.precision is 77; it must be 64 or 32 or 16 or",
    "--trainer.logger 5": "trainer.logger is 5; it must be",
    "--trainer.accumulate_grad_batches 0": "trainer.accumulate_grad_batches is 0; it must be a whole number from 1 on",
    "--trainer.gradient_clip_val -1.5": "trainer.gradient_clip_val is -1.5; it must be a number from 0 on",
    "--ckpt_path=": "--ckpt_path=: is empty; name something, or leave it out",
}
CONFIGS = {
    "model: 5": "model is 5; it must be a class_path with its init_args",
    "model: {class_path: nope.Nope}": "model.class_path: there is no module nope",
    "model: {class_path: os.system}": "model.class_path is os.system; it must be a LightningModule",
    "data: {class_path: fromage.CC3M, init_args: {train_shards: [1]}}": "data.train_shards is 1; it must be a text",
    "data: {class_path: fromage.CC3M, init_args: 5}": "data is {'class_path': 'fromage.CC3M', 'init_args': 5}; it must be",
    "trainer: 5": "trainer is 5; it must be a mapping",
    CALLBACK % "bogus: 1": "trainer.callbacks.bogus: fromage.SafeCheckpoint has no such option",
    CALLBACK % "save_top_k: x": "trainer.callbacks.save_top_k is x; it must be a whole number",
}


def one_line(words, capsys):
    assert main(["fit", "--config", "toy.yaml", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fromage: ")]
    assert not any(word in line for word in ("<class", "Subtypes", "typing.", "Parser key", "NoneType", "object")), line
    return line


@pytest.mark.parametrize("option", OPTIONS)
def test_a_wrong_option(option, capsys):
    assert OPTIONS[option] in one_line(option.split(), capsys)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_wrong_configuration(config, tmp_path, capsys):
    (tmp_path / "odd.yaml").write_text(config)
    assert CONFIGS[config] in one_line(["--config", str(tmp_path / "odd.yaml")], capsys)
