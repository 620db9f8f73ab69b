"""Import the modules of all operators, which fills the registry in `jitnorm.core.operators`.

Code that reads the whole registry imports this module, because the command `jitnorm` does not import the operators with
the package.
"""

import jitnorm.activation
import jitnorm.dual_rmsnorm
import jitnorm.fused_add_rmsnorm
import jitnorm.gated_rmsnorm
import jitnorm.general_rmsnorm
import jitnorm.layernorm
import jitnorm.qknorm
import jitnorm.qknorm_rope_store
import jitnorm.quant_fp8
import jitnorm.rmsnorm
import jitnorm.rmsnorm_quant_fp8
import jitnorm.store_cache  # noqa: F401
