# The paper's 9B model: 9.18B parameters, 1.66B of them active, 105B tokens (Table 5).
#   torchrun --standalone --nproc_per_node=8 train.py config/mhc_9b.py --out_dir=out/mhc_9b
# --residual=hc and --residual=baseline make its rivals; each wants an out_dir of its own.
from config.table5 import *  # noqa: F403

n_layer = 18
n_embd = 1920
n_head = 24
n_routed_experts = 64
moe_intermediate_size = 1280
intermediate_size = 8 * 1280
batch_size = 512
max_steps = 50_000
lr = 5.9e-4
