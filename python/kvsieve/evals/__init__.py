"""What a bounded memory costs and keeps: likelihood while streaming, a shopping list, a passkey."""
