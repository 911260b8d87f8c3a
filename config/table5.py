# What all four models of the paper share (Table 5), and what this repository adds to train them. Imported by mhc_*.py.

# the paper's
vocab_size = 129280
seq_len = 4096
qk_nope_head_dim = 128  # "attention dim"
v_head_dim = 128
kv_lora_rank = 512
qk_rope_head_dim = 64
rope_theta = 10000.0
norm_eps = 1e-20
first_k_dense_replace = 1
num_experts_per_tok = 6
n_shared_experts = 2
n_streams = 4
alpha_init = 0.01
sinkhorn_iters = 20
warmup_steps = 2000
beta1, beta2 = 0.9, 0.95
adam_eps = 1e-20
weight_decay = 0.1
lr_schedule = "step"
decay_at, decay_rates = "0.8,0.9", "0.316,0.1"

# not in the paper: DeepSeek-V3's, or our own
q_lora_rank = 0  # the only choice that gives the paper's parameter counts
init_std = 0.006
route_scale = 2.5
bias_update_speed = 0.001
grad_clip = 1.0
data_dir = "data/c4_cl100k_base"  # 100277 tokens, padded to the paper's vocabulary; uint32 shards
dtype = "bfloat16"
micro_batch_size = 1
parallel = "fsdp"
recompute = "mhc"
reduce_always = True  # hundreds of micro-batches a step on one node: whole gradients would not fit between them
plan_devices = 8  # what --dry_run=True plans for
eval_interval = 1000
eval_sequences = 256
checkpoint_interval = 500
