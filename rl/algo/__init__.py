"""The mathematics: pure functions on tensors, torch only. Shapes: _B episodes, _T time, _N trained tokens, _G group."""
