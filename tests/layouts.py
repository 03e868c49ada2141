"Public layouts with random weights, and plain reference computations of their images: no module of the package is used here."
import argparse, collections, contextlib, math, pickle, sys, types
import torch, torch.nn.functional as F

FIR = torch.outer(torch.tensor([1., 3, 3, 1]), torch.tensor([1., 3, 3, 1])) / 64

# ---- random weights under the published names

def draw(seed):
    "Random numbers of a size that keeps signals alive."
    g = torch.Generator().manual_seed(seed)
    return lambda *shape, std=1., mean=0.: mean + std * torch.randn(*shape, generator=g)

def layer(out, at, n_in, n_out, w_dim, res, r, torgb=False):
    out[at + 'weight'] = r(n_out, n_in, 1, 1) if torgb else r(n_out, n_in, 3, 3)
    out[at + 'bias'], out[at + 'affine.weight'] = r(n_out, std=.2), r(n_in, w_dim)
    out[at + 'affine.bias'] = r(n_in, std=.2, mean=1.)
    if torgb: return
    out[at + 'noise_const'], out[at + 'noise_strength'], out[at + 'resample_filter'] = r(res, res), r(1, std=.3)[0], FIR.clone()

def nvidia(res, channels, z_dim=16, w_dim=16, n_map=2, arch='skip', img=3, seed=0):
    "stylegan2-ada-pytorch's tensors by name; `channels` from 4x4 up."
    r, out, sizes = draw(seed), {}, [2**i for i in range(2, int(math.log2(res)) + 1)]
    for i in range(n_map):
        out[f'mapping.fc{i}.weight'] = r(w_dim, w_dim if i else z_dim) * 100
        out[f'mapping.fc{i}.bias'] = r(w_dim, std=20.)
    out['mapping.w_avg'] = r(w_dim)
    out['synthesis.b4.const'] = r(channels[0], 4, 4)
    for k, (s, c) in enumerate(zip(sizes, channels, strict=True)):
        at = f'synthesis.b{s}.'
        out[at + 'resample_filter'] = FIR.clone()
        if k: layer(out, at + 'conv0.', channels[k - 1], c, w_dim, s, r)
        layer(out, at + 'conv1.', c, c, w_dim, s, r)
        if arch == 'skip' or s == res: layer(out, at + 'torgb.', c, img, w_dim, s, r, torgb=True)
        if arch == 'resnet' and k: out[at + 'skip.weight'], out[at + 'skip.resample_filter'] = r(c, channels[k - 1], 1, 1), FIR.clone()
    return out

def rosinality(res, channels, dim=16, n_map=2, seed=0):
    "rosinality's tensors by name, drawn on their own."
    r, out = draw(seed), {}
    def conv(at, n_in, n_out, size, noise=None, up=False):
        out[at + '.conv.weight'] = r(1, n_out, n_in, size, size)
        out[at + '.conv.modulation.weight'], out[at + '.conv.modulation.bias'] = r(n_in, dim), r(n_in, std=.2, mean=1.)
        if up: out[at + '.conv.blur.kernel'] = FIR * 4
        if size == 1: out[at + '.bias'] = r(1, 3, 1, 1, std=.2)
        else:
            out[at + '.noise.weight'], out[at + '.activate.bias'] = r(1, std=.3), r(n_out, std=.2)
            s = 2**((noise + 5) // 2)
            out[f'noises.noise_{noise}'] = r(1, 1, s, s)
    for i in range(n_map): out[f'style.{i + 1}.weight'], out[f'style.{i + 1}.bias'] = r(dim, dim) * 100, r(dim, std=20.)
    out['input.input'] = r(1, channels[0], 4, 4)
    conv('conv1', channels[0], channels[0], 3, 0)
    conv('to_rgb1', channels[0], 3, 1)
    for k, (a, b) in enumerate(zip(channels, channels[1:])):
        conv(f'convs.{2 * k}', a, b, 3, 2 * k + 1, up=True)
        conv(f'convs.{2 * k + 1}', b, b, 3, 2 * k + 2)
        conv(f'to_rgbs.{k}', b, 3, 1)
        out[f'to_rgbs.{k}.upsample.kernel'] = FIR * 4
    return out

# ---- reference images: NVIDIA's, sample by sample, with zeros inserted and true convolutions

def act(x, gain=1.): return torch.where(x > 0, x, .2 * x) * math.sqrt(2) * gain

def zeros_between(x, n):
    out = torch.zeros(*x.shape[:-2], n, n)
    out[..., ::2, ::2] = x
    return out

def blur(x, before, after, gain):
    "FIR over every channel of (C,H,W)."
    return F.conv2d(F.pad(x, [before, after, before, after])[:, None], FIR[None, None] * gain)[:, 0]

def enlarge(x): return blur(zeros_between(x, 2 * x.shape[-1]), 2, 1, 4.)

def dense(x, w, b, lr=1.): return x @ w.T * lr / math.sqrt(w.shape[1]) + b * lr

def code(z, weights, biases, mean, psi):
    "Mapping network and truncation."
    x = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for w, b in zip(weights, biases): x = act(dense(x, w, b, .01))
    return mean + psi * (x - mean)

def filtered(x, weight, s, up):
    "One sample through a modulated and demodulated convolution."
    w = weight * s[None, :, None, None]
    w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
    if not up: return F.conv2d(x[None], w, padding=1)[0]
    grown = F.conv2d(zeros_between(x, 2 * x.shape[-1] - 1)[None], w.flip(2, 3), padding=2)[0]
    return blur(grown, 1, 1, 4.)

def bound(x, c): return x if c is None else x.clamp(-c, c)

def nvidia_image(t, w, clamp=None):
    "The image (3,H,W) of one code."
    sizes = [2**i for i in range(2, 11) if f'synthesis.b{2**i}.conv1.weight' in t]
    resnet = 'synthesis.b8.skip.weight' in t
    def conv(x, at, up, gain=1.):
        y = filtered(x, t[at + 'weight'], dense(w, t[at + 'affine.weight'], t[at + 'affine.bias']), up)
        y = y + t[at + 'noise_const'] * t[at + 'noise_strength'] + t[at + 'bias'][:, None, None]
        return bound(act(y, gain), clamp and clamp * gain)
    x, img = t['synthesis.b4.const'], None
    for s in sizes:
        at, old = f'synthesis.b{s}.', x
        if s > 4: x = conv(x, at + 'conv0.', True)
        x = conv(x, at + 'conv1.', False, math.sqrt(.5) if resnet and s > 4 else 1.)
        if resnet and s > 4:
            k = t[at + 'skip.weight']
            x = x + enlarge(torch.einsum('oi,ihw->ohw', k[:, :, 0, 0], old) / math.sqrt(k.shape[1])) * math.sqrt(.5)
        if img is not None: img = enlarge(img)
        if at + 'torgb.weight' in t:
            k = t[at + 'torgb.weight'][:, :, 0, 0]
            y = torch.einsum('oi,i,ihw->ohw', k, dense(w, t[at + 'torgb.affine.weight'], t[at + 'torgb.affine.bias']), x) / math.sqrt(k.shape[1])
            y = bound(y + t[at + 'torgb.bias'][:, None, None], clamp)
            img = y if img is None else img + y
    return img

def nvidia_images(t, z, psi=1., clamp=None):
    n = sum(k.startswith('mapping.fc') for k in t) // 2
    w = code(z, [t[f'mapping.fc{i}.weight'] for i in range(n)], [t[f'mapping.fc{i}.bias'] for i in range(n)], t['mapping.w_avg'], psi)
    return torch.stack([nvidia_image(t, x, clamp) for x in w])

# ---- reference images: rosinality's, a whole batch, with grouped and transposed convolutions

def rosinality_images(t, mean, z, psi=1.):
    n_map, b = sum(k.startswith('style.') for k in t) // 2, len(z)
    w = code(z, [t[f'style.{i + 1}.weight'] for i in range(n_map)], [t[f'style.{i + 1}.bias'] for i in range(n_map)], mean, psi)
    def modulated(x, at, up, demodulate):
        k = t[at + '.conv.weight']
        s = dense(w, t[at + '.conv.modulation.weight'], t[at + '.conv.modulation.bias'])
        k = k / math.sqrt(k[0, 0].numel()) * s[:, None, :, None, None]
        if demodulate: k = k * torch.rsqrt(k.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        o, i, n = k.shape[1], k.shape[2], k.shape[3]
        x = x.reshape(1, b * i, *x.shape[2:])
        if not up: return F.conv2d(x, k.reshape(b * o, i, n, n), padding=n // 2, groups=b).reshape(b, o, *x.shape[2:])
        x = F.conv_transpose2d(x, k.transpose(1, 2).reshape(b * i, o, n, n), stride=2, groups=b)
        kernel = t[at + '.conv.blur.kernel'].expand(b * o, 1, 4, 4)
        x = F.conv2d(F.pad(x, [1, 1, 1, 1]), kernel, groups=b * o)
        return x.reshape(b, o, *x.shape[2:])
    def styled(x, at, i, up=False):
        x = modulated(x, at, up, True) + t[f'noises.noise_{i}'] * t[at + '.noise.weight']
        return F.leaky_relu(x + t[at + '.activate.bias'][:, None, None], .2) * 2**.5
    def rgb(x, at): return modulated(x, at, False, False) + t[at + '.bias']
    x = styled(t['input.input'].expand(b, -1, -1, -1), 'conv1', 0)
    img, k = rgb(x, 'to_rgb1'), 0
    while f'to_rgbs.{k}.bias' in t:
        x = styled(styled(x, f'convs.{2 * k}', 2 * k + 1, up=True), f'convs.{2 * k + 1}', 2 * k + 2)
        kernel = t[f'to_rgbs.{k}.upsample.kernel'].expand(3, 1, 4, 4)
        big = F.pad(zeros_between(img, 2 * img.shape[-1]), [2, 1, 2, 1])
        img, k = F.conv2d(big, kernel, groups=3) + rgb(x, f'to_rgbs.{k}'), k + 1
    return img

# ---- files

SOURCE = 'import os\nos.system("touch source_was_run")\nraise SystemExit("the source inside the file was run")\n'

@contextlib.contextmanager
def modules(**names):
    "Modules of these names and contents exist for a while, as pickle wants them when it writes."
    old = {k.replace('__', '.'): sys.modules.get(k.replace('__', '.')) for k in names}
    for k, content in names.items():
        m = sys.modules[k.replace('__', '.')] = types.ModuleType(k.replace('__', '.'))
        for x in content: x.__module__, x.__qualname__ = m.__name__, x.__name__; setattr(m, x.__name__, x)
    try: yield
    finally:
        for k, m in old.items():
            if m is None: del sys.modules[k]
            else: sys.modules[k] = m

def _reconstruct_persistent_obj(meta): raise AssertionError('the file was executed')

class EasyDict(dict): pass

class Network:
    "Pickles as NVIDIA's persistent classes do: a function, the class's source, a state."
    def __init__(self, cls, state): self.cls, self.state = cls, state
    def __reduce__(self):
        meta = EasyDict(type='class', version=6, module_src=SOURCE, class_name=self.cls, state=self.state)
        return _reconstruct_persistent_obj, (meta,), None

def network(cls, tensors, at='', **attributes):
    "The tree of modules that tensor names describe."
    here = {k[len(at):]: v for k, v in tensors.items() if k.startswith(at)}
    kids = list(dict.fromkeys(k.split('.')[0] for k in here if '.' in k))
    own = {k: v for k, v in here.items() if '.' not in k}
    fixed = ('noise_const', 'resample_filter', 'w_avg')
    state = dict(training=False, _backward_hooks=collections.OrderedDict(),
                 _parameters=collections.OrderedDict((k, torch.nn.Parameter(v)) for k, v in own.items() if k not in fixed),
                 _buffers=collections.OrderedDict((k, v) for k, v in own.items() if k in fixed),
                 _modules=collections.OrderedDict((k, network('Module', tensors, f'{at}{k}.', **attributes)) for k in kids))
    kind = at.split('.')[-2] if at else ''
    if kind.startswith('conv') or kind == 'torgb' or kind == 'skip': state['conv_clamp'] = None if kind == 'skip' else attributes.get('clamp')
    if kind.startswith(('conv', 'fc')): state['activation'] = attributes.get('activation', 'lrelu')
    if kind == 'affine': state['activation'] = 'linear'
    if kind.startswith('fc'): state['bias_gain'] = attributes.get('lr_mul', .01)
    if not at: state |= dict(c_dim=attributes.get('c_dim', 0), _init_args=(), _init_kwargs=EasyDict(z_dim=1))
    return Network(cls, state)

def write_pkl(path, tensors, others=True, protocol=4, cls='Generator', **attributes):
    "stylegan2-ada-pytorch's file."
    G = network(cls, tensors, **attributes)
    data = dict(G=network(cls, tensors, **attributes), D=network('Discriminator', {'b4.fc.weight': torch.randn(3, 3)}), G_ema=G,
                training_set_kwargs=EasyDict(path='x.zip'), augment_pipe=None) if others else dict(G_ema=G)
    with modules(torch_utils=(), torch_utils__persistence=(_reconstruct_persistent_obj,), dnnlib=(), dnnlib__util=(EasyDict,)), open(path, 'wb') as f:
        pickle.dump(data, f, protocol)

def write_pt(path, tensors, mean, legacy=False, training=False):
    "rosinality's file."
    data = dict(g_ema=collections.OrderedDict(tensors), latent_avg=mean)
    if training: data |= dict(g=tensors, d={'final_linear.0.weight': torch.randn(2, 2)}, args=argparse.Namespace(size=8), ada_aug_p=0.)
    torch.save(data, path, _use_new_zipfile_serialization=not legacy)

def write_psp(path, tensors, mean, L, namespace=False, legacy=False):
    "A pSp-family file: encoder and decoder in one dictionary."
    opts = dict(stylegan_size=64, encoder_type='Encoder4Editing', device='cuda')
    sd = {'encoder.input_layer.0.weight': torch.randn(4, 3, 3, 3)} | {'decoder.' + k: v for k, v in tensors.items()}
    torch.save(dict(state_dict=sd, latent_avg=mean.repeat(L, 1), opts=argparse.Namespace(**opts) if namespace else opts),
               path, _use_new_zipfile_serialization=not legacy)
