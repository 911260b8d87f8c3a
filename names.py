"""What other programs call our settings: whoever types it is told the name here, or that there is none and why.

nanoGPT's users first; then the names of transformers' configs and of other hyper-connections packages.
"""

NO_KV_HEADS = "there is none: attention is MLA, whose keys and values are read from one latent of width kv_lora_rank"
WANDB = "there is none: log='wandb', and the run's name is out_dir"

ELSEWHERE = {  # of train.py: its own name, or a few words
    # the loop
    "learning_rate": "lr", "max_lr": "lr", "max_iters": "max_steps", "num_steps": "max_steps",
    "num_iterations": "max_steps", "warmup_iters": "warmup_steps", "eval_every": "eval_interval",
    "save_interval": "checkpoint_interval", "max_grad_norm": "grad_clip", "adam_beta1": "beta1",
    "adam_beta2": "beta2", "eps": "adam_eps", "dataset": "data_dir", "resume": "init_from",
    "device_batch_size": "micro_batch_size", "total_batch_size": "batch_size, which counts sequences and not tokens",
    "gradient_accumulation_steps": "there is none: batch_size counts all sequences of an optimizer step, "
    "micro_batch_size those of one forward; the quotient is accumulated",
    "grad_accum_steps": "there is none: batch_size over micro_batch_size and processes is accumulated",
    "min_lr": "there is none: min_lr_ratio is the LR at the end as a fraction of lr",
    "decay_lr": "there is none: lr_schedule='constant' keeps the LR",
    "lr_decay_iters": "there is none: 'cosine' ends at max_steps, and 'step' decays at the fractions decay_at of them",
    "eval_iters": "there is none: eval_sequences counts the sequences of an evaluation",
    "eval_only": "there is none: python eval.py RUN --tasks=loss scores a checkpoint",
    "log_interval": "there is none: every step is printed and recorded",
    "always_save_checkpoint": "there is none: one is saved every checkpoint_interval steps, and the best one is kept",
    "wandb_log": WANDB, "wandb_project": WANDB, "wandb_run_name": WANDB,
    "epochs": "there is none: wanted max_steps", "num_epochs": "there is none: wanted max_steps",
    "backend": "there is none: nccl between GPUs, gloo between CPUs",
    # the model
    "block_size": "seq_len", "context_length": "seq_len", "max_position_embeddings": "seq_len", "n_layers": "n_layer",
    "num_hidden_layers": "n_layer", "depth": "n_layer", "n_heads": "n_head", "num_attention_heads": "n_head",
    "hidden_size": "n_embd", "d_model": "n_embd", "dim": "n_embd", "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std", "num_experts": "n_routed_experts", "routed_scaling_factor": "route_scale",
    "n_kv_head": NO_KV_HEADS, "n_kv_heads": NO_KV_HEADS, "num_key_value_heads": NO_KV_HEADS,
    "dropout": "there is none, as in DeepSeek-V3",
    "bias": "there is none: no linear layer has a bias, as in DeepSeek-V3",
    "tie_word_embeddings": "there is none: embedding and head are two matrices, as in DeepSeek-V3",
    "expansion_rate": "n_streams", "hc_mult": "n_streams", "num_residual_streams": "n_streams",
    "hc_sinkhorn_iters": "sinkhorn_iters",
}  # fmt: skip

RUN_FOLDER = "the run folder is an argument without a name: python sample.py out/run"

SAMPLE = {  # of sample.py
    "start": "prompt", "max_tokens": "max_new_tokens", "n": "num_samples", "temp": "temperature",
    "out_dir": RUN_FOLDER, "init_from": RUN_FOLDER, "checkpoint": RUN_FOLDER,
}  # fmt: skip
