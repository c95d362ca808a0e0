"""How a kernel is computed: `structured` and `jacobian` exactly, `projected` by random projections."""
