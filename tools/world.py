"""Make again all that stands on SDFaces: networks, samples, records, chapters; in order, each step once.

    python tools/world.py [--only STEP ...] [--preset tiny] [--work runs/world]

A step that is done is not done again (`done.json` in --work says when, and how long it took); a training that was stopped
goes on. Delete a step's line there to have it done again. The package's own files change in the steps from `install` on.
"""
import argparse, json, os, shutil, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED, RESULTS = ROOT/'cycle_nb'/'pretrained', ROOT/'data'/'results'
MEASURED = ['precision', 'recall', 'frechet', 'real_against_real', 'probe_r2', 'missed', 'images', 'referee']


def run(*args):
    "A command of this repository's Python, from its root; stops everything when it fails."
    print('$', *args, flush=True)
    subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, check=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))


def train(part, folder, preset, *more): run('-m', 'cycle_nb', 'train', part, '--out', folder, '--preset', preset, '--resume', *more)


def install(work):
    "The new networks take the place of the old ones."
    for name in ('sdfaces64', 'referee64'):
        for old in (SHIPPED/name).glob('*.*'): old.unlink()
        for new in (work/name).glob('*.*'): shutil.copy(new, SHIPPED/name)


def samples():
    "Draw the sample images again."
    run('-c', 'from cycle_nb.images import samples_dir, write_samples; write_samples(samples_dir())')


def benchmark(what, name, *more): run('-m', 'cycle_nb', 'benchmark', what, '--out', RESULTS/f'{name}.json', '--overwrite', *more)


def measure_generator(images):
    "What the referee says of the generator goes into its record and its card."
    benchmark('generator', 'generator_by_referee', '--images', images, '--referee', 'referee64')
    sys.path.insert(0, str(ROOT))
    from cycle_nb.models import load_tensors, save_tensors
    found, file = json.loads((RESULTS/'generator_by_referee.json').read_text()), SHIPPED/'sdfaces64'/'generator.safetensors'
    tensors, card = load_tensors(file)
    save_tensors(file, tensors, card | dict(figures={k: found[k] for k in MEASURED}))


NETS, ENCODERS = ('attributes', 'perceptual', 'identity'), 'cycle,w_long,wplus_long'
QUALITY = f'{ENCODERS},w,wplus,cycle-all,cycle+refine,w_long+refine,wplus_long+refine'   # trained again, they are measured again
ONCE = 'cycle,restyle,opt-w,opt-wplus,opt-w-long,cycle+refine,cycle+refine-paper,cycle+refine-free,cycle+refine-train'
TUNED = 'cycle,cycle+tune,w_long+tune,wplus_long+tune,opt-w+tune,opt-wplus+tune,cycle+refine+tune'
TRAINED = 'cycle+tune,w_long+tune,wplus_long+tune,cycle+refine+tune'
PAPER = 'cycle,cycle+tune,cycle+refine+tune'


def copy_parts(work, to, *parts):
    "Some of the new networks, into another bundle."
    to.mkdir(parents=True, exist_ok=True)
    for part in parts:
        for end in ('safetensors', 'json'): shutil.copy(work/'sdfaces64'/f'{part}.{end}', to)


def train_again(work, seed, preset):
    "The encoders from another seed, for the same generator."
    folder = work/f'seed{seed}'/'sdfaces64'
    copy_parts(work, folder, 'generator', *NETS, 'directions')
    train('encoder', folder, preset, '--seed', seed, '--encoders', ENCODERS)


def soft_bundle(work, preset):
    "The generator as the regression left it, with directions of its own: does the price hang on how W was made?"
    folder, soft = work/'regression64', work/'sdfaces64'/'work'/'generator'
    copy_parts(work, folder, *NETS)
    for end in ('safetensors', 'json'): shutil.copy(soft/f'regression.{end}', folder/f'generator.{end}')
    train('directions', folder, preset)


def steps(work, preset):
    "Name -> what to call."
    few, mine, seeds = preset == 'tiny', work/'sdfaces64', {s: work/f'seed{s}'/'sdfaces64' for s in (1, 2)}
    count = lambda a, b: ['--images', 4, '--outside', 2, '--workers', 1] if few else ['--images', a, '--outside', b, '--referee', 'referee64']
    short = ['--tune', 2 if few else 60]
    def quality(name, methods, faces, *more, of=mine):
        benchmark('quality', name, *faces, '--bundle', of, '--methods', methods, '--work', work/'quality', *more)
    return dict(
        nets=lambda: train('nets', mine, preset),
        referee=lambda: train('nets', work/'referee64', preset, '--seed', 1),
        generator=lambda: train('generator', mine, preset),
        encoders=lambda: train('encoder', mine, preset, '--encoders', ENCODERS),
        directions=lambda: train('directions', mine, preset),
        install=lambda: install(work),
        samples=samples,
        referee_says=lambda: measure_generator(60 if few else 5000),
        demo=lambda: benchmark('demo', 'demo'),
        render=lambda: benchmark('render', 'render'),
        speed=lambda: benchmark('speed', 'speed'),
        restyle=lambda: train('encoder', mine, preset, '--encoders', 'restyle'),          # is measured, does not ship
        seed1=lambda: train_again(work, 1, preset),
        seed2=lambda: train_again(work, 2, preset),
        price=lambda: benchmark('price', 'price', *count(128, 128), *(short if few else []), '--work', work/'price'),
        regression=lambda: soft_bundle(work, preset),
        price_regression=lambda: benchmark('price', 'price_regression', *count(32, 0), '--bundle', work/'regression64', '--work', work/'price'),
        quality=lambda: quality('quality', QUALITY, count(256, 128)),
        quality_once=lambda: quality('quality_once', ONCE, count(64, 32)),
        quality_tuned=lambda: quality('quality_tuned', TUNED, count(64, 32), *short),
        quality_paper=lambda: quality('quality_paper', PAPER, count(64, 32), *short[:few*2], '--preset', 'paper'),
        again=lambda: [quality(f'quality_seed{s}', QUALITY, count(256, 128), of=of) for s, of in seeds.items()],
        again_tuned=lambda: [quality(f'quality_tuned_seed{s}', TRAINED, count(64, 32), *short, of=of) for s, of in seeds.items()],
        seeds=lambda: [benchmark('seeds', name.replace('quality', 'seeds'), *(RESULTS/f'{name}{s}_faces.csv.gz' for s in ('', *(f'_seed{s}' for s in seeds))))
                       for name in ('quality', 'quality_tuned')],
        chapters=lambda: run('tools/nb.py', 'execute'),
        readme=lambda: run('tools/nb.py', 'readme'))


def main():
    "Do what is not done."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--work', type=Path, default=ROOT/'runs'/'world', help='folder of the trainings and of done.json')
    p.add_argument('--preset', default='sdfaces64', help='how long the trainings are: sdfaces64 (default) or tiny')
    p.add_argument('--only', nargs='+', metavar='STEP', help='these steps alone')
    o = p.parse_args()
    o.work.mkdir(parents=True, exist_ok=True)
    file, todo = o.work.resolve()/'done.json', steps(o.work.resolve(), o.preset)
    done = json.loads(file.read_text()) if file.exists() else {}
    if bad := set(o.only or ()) - set(todo): p.error(f'no step {", ".join(sorted(bad))}; there are {", ".join(todo)}')
    for name in o.only or todo:
        if name in done: continue
        start = time.time()
        todo[name]()
        done[name] = dict(ended=time.strftime('%F %T'), hours=round((time.time() - start)/3600, 3))
        file.write_text(json.dumps(done, indent=1))
    print(*(f'{k:13} {v["hours"]:.2f} h' for k, v in done.items()), f'{"all":13} {sum(v["hours"] for v in done.values()):.2f} h', sep='\n')


if __name__ == '__main__': main()
