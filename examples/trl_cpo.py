"""Controllable Preference Optimization inside TRL: rated answers in a generated world, stage one with FusedSFTTrainer,
stage two with FusedDPOTrainer, then what the model achieves of what is requested.

Run: python examples/trl_cpo.py [--quick] [FOLDER]      (about 10 minutes on two cores; --quick: one)
Then: cpo-kernels play runs/trl_cpo/cdpo
"""

import sys

try:
    from datasets import Dataset
    from trl import SFTConfig

    from cpo_kernels.demo.judge import held_out, judge
    from cpo_kernels.demo.model import build_model, build_tokenizer
    from cpo_kernels.demo.run import QUICK, Size
    from cpo_kernels.demo.world import OBJECTIVES, World
    from cpo_kernels.evaluation.controllability import control_table
    from cpo_kernels.integrations import FusedDPOConfig, FusedDPOTrainer, FusedSFTTrainer, RatedData
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: this example needs TRL and datasets, the extra [trl] of cpo-kernels") from None

ATTAINED = [
    {"sampler": "attained", "share": 0.8},
    {"sampler": "attained", "share": 0.2, "objectives": ["harmlessness"]},
]
BEYOND = [{"sampler": "best", "share": 0.6}, {"sampler": "grid", "share": 0.4}]  # also what no answer attains
OPTIONS = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "adam_beta2": 0.98, "warmup_steps": 20}
OPTIONS |= {"report_to": [], "save_strategy": "no", "logging_steps": 50}


def main(size, folder):
    world, tokenizer = World(0, size.people), build_tokenizer()
    asked = dict(world.rated_questions(size.prompts, seed=0))  # {question: [answer, ...]}
    rows = [
        {"prompt": q.prompt, "responses": [{"text": text, "ratings": world.rate(q, text)} for text in texts]}
        for q, texts in asked.items()
    ]
    data = RatedData(Dataset.from_list(rows), tokenizer, OBJECTIVES, template={"answer_prefix": " "})

    model = build_model(tokenizer, size.hidden_size, size.num_layers)
    options = {"num_train_epochs": size.cpsft_epochs, "learning_rate": size.sft_lr, **OPTIONS}
    args = SFTConfig(f"{folder}/cpsft", per_device_train_batch_size=size.batch_size, **options)
    rows = data.cpsft({"mixture": ATTAINED})
    trainer = FusedSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    data.save(trainer)

    options = {"num_train_epochs": size.preference_epochs, "learning_rate": size.preference_lr, **OPTIONS}
    args = FusedDPOConfig(f"{folder}/cdpo", objectives=OBJECTIVES, beta=0.3, per_device_train_batch_size=64, **options)
    rows = data.cdpo({"mixture": ATTAINED + BEYOND, "per_prompt": 3, "pairs": 3})
    trainer = FusedDPOTrainer(f"{folder}/cpsft/model", None, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    data.save(trainer)

    questions = held_out(world, size.held_out, seed=0, exclude=frozenset(asked))
    judged = judge(world, trainer.model, data.template, questions, tags=True)
    print(control_table({"CPO in TRL": judged.control}))


if __name__ == "__main__":
    folders = [word for word in sys.argv[1:] if word != "--quick"]
    main(QUICK if "--quick" in sys.argv else Size(), folders[0] if folders else "runs/trl_cpo")
