"""One rank: owns weights, KV tensors and sampling slots, and executes StepPlans."""
