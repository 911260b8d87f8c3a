# The paper's 27B model: 27.05B parameters, 4.14B of them active, 262B tokens (Table 5).
#   torchrun --standalone --nproc_per_node=8 train.py config/mhc_27b.py --out_dir=out/mhc_27b
# --residual=hc and --residual=baseline make its rivals; each wants an out_dir of its own.
from config.table5 import *  # noqa: F403

n_layer = 30
n_embd = 2560
n_head = 32
n_routed_experts = 72
moe_intermediate_size = 1536
intermediate_size = 8 * 1536
batch_size = 1280
max_steps = 50_000
lr = 4.0e-4
