# The paper's 3B model: 2.97B parameters, 612M of them active, 39.3B tokens (Table 5).
#   torchrun --standalone --nproc_per_node=8 train.py config/mhc_3b.py --out_dir=out/mhc_3b
# --residual=hc and --residual=baseline make its rivals; each wants an out_dir of its own.
from config.table5 import *  # noqa: F403

n_layer = 12
n_embd = 1280
n_head = 16
n_routed_experts = 64
moe_intermediate_size = 896
intermediate_size = 8 * 896
batch_size = 320
max_steps = 30_000
lr = 8.6e-4
