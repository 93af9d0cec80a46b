"""Operations that distillation spends its time in, each with a plain-torch reference."""
