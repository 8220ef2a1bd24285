"""Networks, and what distillation attaches to them: taps, adapters and the teacher."""
