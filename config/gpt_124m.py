# One GPU: about 121M active of 277M parameters with mHC, on ten billion GPT-2 tokens of FineWeb.
#   python prepare_data.py --dataset=fineweb10b --tokenizer=gpt2 --tokens=1e10
#   python train.py config/gpt_124m.py
data_dir = "data/fineweb10b_gpt2"
vocab_size = 50304  # 50257 padded to a multiple of 64
dtype = "bfloat16"
seq_len = 1024
n_layer = 12
n_embd = 768
n_head = 12
kv_lora_rank = 256
qk_nope_head_dim = 64
qk_rope_head_dim = 32
v_head_dim = 64
n_routed_experts = 16
num_experts_per_tok = 4
moe_intermediate_size = 384
intermediate_size = 8 * 384
batch_size = 480  # 491,520 tokens a step
micro_batch_size = 16  # 21 GB by --dry_run=True, for a card of 24; 0 takes as many as are reckoned to fit this one
max_steps = 20_000  # 9.8B tokens
warmup_steps = 500
lr = 1.2e-3
eval_interval = 250
eval_sequences = 512
