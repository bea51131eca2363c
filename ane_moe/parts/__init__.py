"""PyTorch blocks in the form the Neural Engine prefers: rank 4, `(1, C, 1, S)`, every projection a
1x1 convolution.

Shape legend, used by every comment in this package:

    d  channels of the residual stream        T  tokens in the call
    H  query heads, K  key/value heads        D  channels of a head (G = H / K query heads share
    one)
    S  slots of the KV cache                  E  experts, I  channels inside an expert

Source of the form: "Deploying Transformers on the Apple Neural Engine", machinelearning.apple.com
(2022).
"""
