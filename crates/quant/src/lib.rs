//! GPTQ: grids, the solver and its recipes, as functions of weights and Hessians.
